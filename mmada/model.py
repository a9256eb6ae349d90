"""The model, top to bottom: ids, embeddings, N blocks, norm, head.

# B batch, T tokens, D model, V vocabulary, E experts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmada.config import MMaDAConfig
from mmada.nn.block import Block
from mmada.nn.experts import Experts
from mmada.nn.mixers.attention import Attention
from mmada.nn.positions import rotary_cos_sin
from mmada.nn.router import RouterTap, mix64, selection_bias_of
from mmada.tokenizer import register_tokenizer
from mmada.training.objectives.router import router_losses


@dataclass
class MMaDAOutput(MoeCausalLMOutputWithPast):
    """``loss`` is what training minimises; the parts beside it are detached and for reading."""

    lm_loss: Tensor | None = None
    z_loss: Tensor | None = None
    expert_load: Tensor | None = None


class MMaDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to save, load, cast and initialise the family."""

    config_class = MMaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, RouterTap) and module.noise_weight is not None:
            init.zeros_(module.noise_weight)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            init.zeros_(bias)


class MMaDAModel(MMaDAPreTrainedModel):
    """Token embeddings and the stack of blocks; returns the normed hidden states."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        sample_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """(B, T) ids or (B, T, D) embeddings to (B, T, D).

        ``position_ids`` that start again inside a row mark packed documents, which do not see each other.
        ``sample_ids`` (B,), int64, names the rows in the whole run; the router's noise is a function of it. Without
        it the noise is drawn from torch's generator.
        Raises ValueError unless exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        filled_cache = past_key_values  # a new one has nothing to mask, and packed rows are only seen without one
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = filled_cache.get_seq_length() if filled_cache is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=filled_cache,
            position_ids=position_ids,
        )
        rotary = rotary_cos_sin(self.config, position_ids, hidden.dtype)
        noise_keys_T = self._noise_keys(hidden, sample_ids)
        router_logits = []
        for layer in self.layers:
            hidden, logits_TE = layer(
                hidden,
                noise_keys_T,
                attention_mask=mask,
                position_embeddings=rotary,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            if logits_TE is not None:
                router_logits.append(logits_TE)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            router_logits=tuple(router_logits) or None,
        )

    def _noise_keys(self, hidden_BTD: Tensor, sample_ids_B: Tensor | None) -> Tensor | None:
        """One int64 key per token (B·T,) for the router's noise, in training only; distinct for distinct tokens."""
        if not (self.training and self.config.router_noise and self.config.moe_layers):
            return None
        batch, length = hidden_BTD.shape[:2]
        if sample_ids_B is None:
            sample_ids_B = torch.randint(2**62, (batch,), device=hidden_BTD.device)
        column_T = torch.arange(length, device=hidden_BTD.device)
        return (mix64(sample_ids_B)[:, None] + column_T).flatten()


class MMaDAForCausalLM(MMaDAPreTrainedModel, GenerationMixin):
    """The language model: hidden states to logits, and the loss that training minimises."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config)
        self.model = MMaDAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Sums a tensor of counts over all workers; set by whoever trains on several.
        self.reduce_load: Callable[[Tensor], Tensor] | None = None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MMaDAOutput:
        """Logits (B, T, V), and a loss when ``labels`` or ``shift_labels`` (B, T) are given (-100 is ignored).

        ``labels`` are shifted here, ``shift_labels`` were shifted by the caller. The language-model loss is in nats
        per token, or the sum divided by ``num_items_in_batch``. In training the router's losses are added to it.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        result = MMaDAOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        if labels is None and shift_labels is None:
            return result
        lm_loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            shift_labels=None if shift_labels is None else shift_labels.contiguous(),
            num_items_in_batch=num_items_in_batch,
        )
        result.loss, result.lm_loss = lm_loss, lm_loss.detach()
        if self.training and outputs.router_logits:
            self._add_router_losses(result, num_sequences=logits.shape[0])
        return result

    def _add_router_losses(self, result: MMaDAOutput, num_sequences: int) -> None:
        blocks = [self.model.layers[index] for index in self.config.moe_layers]
        balance, z, result.expert_load = router_losses(
            list(result.router_logits),
            self.config.num_experts_per_tok,
            [selection_bias_of(block.mlp) for block in blocks],
            num_sequences,
            self.config.router_balance_scope,
            self.reduce_load,
        )
        result.aux_loss, result.z_loss = balance.detach(), z.detach()
        result.loss = result.loss + self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z

    @torch.no_grad()
    def update_router_bias(self, load_LE: Tensor) -> None:
        """Loss-free balancing after a step: b += rate · sign(mean load - load) (arXiv:2408.15664).

        ``load_LE`` (expert layers, E) counts the tokens of the whole step over all workers.
        """
        rate = self.config.router_bias_update_rate
        if rate == 0:
            return
        for index, load_E in zip(self.config.moe_layers, load_LE, strict=True):
            bias = selection_bias_of(self.model.layers[index].mlp)
            bias += (rate * (load_E.mean() - load_E).sign()).to(bias)

    def expert_parallel_layout(self) -> dict[str, Any]:
        """Where the experts are, in the words of DeepSpeed's ``expert_parallel`` section."""
        indices = "|".join(str(index) for index in self.config.moe_layers)
        return {
            "moe_layer_pattern": rf"model\.layers\.({indices})\.mlp",
            "router_pattern": "gate",
            "expert_pattern": "experts",
            "expert_w1": "gate_up_proj",
            "expert_w2": "down_proj",
            "expert_w3": None,
            "num_experts_attr": "num_experts",
            "top_k_attr": "num_experts_per_tok",
            "score_func": "softmax",
            "route_norm": self.config.norm_topk_prob,
            "expert_activation": "swiglu",
        }


def count_parameters(config: MMaDAConfig) -> tuple[int, int]:
    """Parameters in all, and those that one token uses; built on the meta device, so no size is too large."""
    with torch.device("meta"):
        model = MMaDAForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    per_expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.num_experts - config.num_experts_per_tok) * per_expert * len(config.moe_layers)
    return total, total - idle


AutoConfig.register("mmada", MMaDAConfig)
AutoModel.register(MMaDAConfig, MMaDAModel)
AutoModelForCausalLM.register(MMaDAConfig, MMaDAForCausalLM)
register_tokenizer(MMaDAConfig)
