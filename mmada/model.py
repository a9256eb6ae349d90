"""The model, top to bottom: ids, embeddings, N blocks, norm, head.

# B batch, T tokens, D model, V vocabulary, E experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mmada.config import MMaDAConfig
from mmada.nn.block import Block
from mmada.nn.cache import MMaDACache, checked_cache
from mmada.nn.context import Context, front_order, take_columns
from mmada.nn.padding import packed_documents, restore_columns, spread_keys, valid_columns
from mmada.nn.patches.byte_patches import BytePatches
from mmada.nn.positions import rotary_cos_sin
from mmada.nn.robustness import InputNoise
from mmada.nn.router import mix64
from mmada.output import MMaDAOutput
from mmada.pretrained import MMaDAPreTrainedModel, TrainableModel
from mmada.tokenizer import register_tokenizer


class MMaDAModel(MMaDAPreTrainedModel):
    """Token embeddings and the stack of blocks; returns the normed hidden states."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.patches = None if config.patches.mode == "none" else BytePatches(config, entropy_model_of(config))
        is_noisy = config.embedding_dropout or config.token_mask_probability
        self.input_noise = InputNoise(config) if is_noisy else None
        self.layers = nn.ModuleList([Block(config, index) for index in range(config.num_hidden_layers)])
        # Patches are normed where bytes read them, and bytes by the decoder.
        self.norm = nn.Identity() if self.patches else nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
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
        """(B, T) ids or (B, T, D) embeddings to (B, T, D), D being ``config.embedding_size``.

        ``attention_mask`` (B, T) or (B, past + T) is 0 for padding, which may stand anywhere in a row.
        ``position_ids`` that start again inside a row mark packed documents, which do not see each other.
        ``sample_ids`` (B,), int64, names the rows in the whole run; the noise of training (on the router's logits, on
        the embeddings) is a function of it. Without it the noise is drawn from torch's generator.
        With byte patches hidden states, attentions and router logits are over patches: see ``PatchedOutput``.
        Raises ValueError unless exactly one of ``input_ids`` and ``inputs_embeds`` is given (with byte patches the
        ids), and for a cache or a mask of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self.patches is not None and input_ids is None:
            raise ValueError(
                f"inputs_embeds cannot be grouped by patches.mode={self.config.patches.mode}; give input_ids"
            )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if 0 in hidden.shape[:2]:
            raise ValueError(f"the input has the shape {tuple(hidden.shape[:2])}; give at least one row and one token")
        cache = self._cache(past_key_values, use_cache)
        valid_BT = valid_columns(attention_mask, hidden.shape[1])
        order_BT = None if valid_BT is None else front_order(valid_BT)
        context = self._context(hidden, position_ids, valid_BT, order_BT, cache)
        if order_BT is not None:
            hidden = take_columns(hidden, order_BT)

        def run_stack(states: Tensor, context: Context, cache: MMaDACache | None) -> MoeModelOutputWithPast:
            noise_keys_T = self._noise_keys(states, sample_ids)
            if self.input_noise is not None:
                states = self.input_noise(states, noise_keys_T)
            return self._blocks(states, context, noise_keys_T, cache, return_dict=True, **kwargs)

        if self.patches is None:
            outputs = run_stack(hidden, context, cache)
        else:
            ids_BT = input_ids if order_BT is None or input_ids is None else take_columns(input_ids, order_BT)
            outputs = self.patches(ids_BT, hidden, context, cache, run_stack)
        if cache is not None:
            cache.advance(hidden.shape[1], valid_BT)
        if order_BT is not None:
            restore_columns(outputs, order_BT.argsort(dim=1))
        valid_BS = valid_BT if cache is None else cache.valid_BS
        if outputs.attentions is not None and valid_BS is not None and self.patches is None:
            outputs.attentions = tuple(spread_keys(weights, valid_BS) for weights in outputs.attentions)
        outputs.past_key_values = cache
        return outputs

    def _cache(self, past_key_values: Cache | None, use_cache: bool | None) -> MMaDACache | None:
        if past_key_values is not None:
            return checked_cache(past_key_values)
        return MMaDACache(self.config.num_hidden_layers) if use_cache else None

    def _context(
        self,
        hidden_BTD: Tensor,
        position_ids: Tensor | None,
        valid_BT: Tensor | None,
        order_BT: Tensor | None,
        cache: MMaDACache | None,
    ) -> Context:
        """What the layers are told; hidden states and positions as the caller ordered them."""
        (batch, length), device = hidden_BTD.shape[:2], hidden_BTD.device
        past_B = None if cache is None else cache.lengths_B
        least_past, past = (0, 0) if cache is None else cache.past_range
        are_given = position_ids is not None
        if position_ids is None:
            start = past if past_B is None else past_B[:, None]
            position_ids = (start + torch.arange(length, device=device)[None]).expand(batch, length)
        else:
            position_ids = position_ids.expand(batch, length)
            if order_BT is not None:
                position_ids = take_columns(position_ids, order_BT)
        context = Context(
            shape=(batch, length),
            device=device,
            position_ids_BT=position_ids,
            lengths_B=None if valid_BT is None else valid_BT.sum(dim=1),
            past=past,
            past_B=past_B,
            least_past=least_past,
        )
        if are_given and length > 1:
            context.documents_BT = packed_documents(position_ids, context.valid_BT(), past)
        if cache is not None:
            cache.refuse_packed()
            cache.is_packed = context.documents_BT is not None
        config = self.config if self.patches is None else self.patches.local_config
        if config.position_embedding_type == "rope":
            context.rotary = rotary_cos_sin(config, position_ids, hidden_BTD.dtype)
        return context

    @capture_outputs
    def _blocks(
        self,
        hidden_states: Tensor,
        context: Context,
        noise_keys_T: Tensor | None,
        cache: MMaDACache | None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """The blocks and the last norm, on rows in front layout."""
        router_logits = []
        for layer in self.layers:
            hidden_states, logits_TE = layer(hidden_states, context, noise_keys_T, past_key_values=cache)
            if logits_TE is not None:
                router_logits.append(logits_TE)
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), router_logits=tuple(router_logits) or None
        )

    def _noise_keys(self, hidden_BTD: Tensor, sample_ids_B: Tensor | None) -> Tensor | None:
        """One int64 key per token (B·T,) for the noise of training, if there is any; distinct for distinct tokens."""
        has_router_noise = self.config.router_noise and self.config.moe_layers
        if not (self.training and (has_router_noise or self.input_noise is not None)):
            return None
        batch, length = hidden_BTD.shape[:2]
        if sample_ids_B is None:
            sample_ids_B = torch.randint(2**62, (batch,), device=hidden_BTD.device)
        column_T = torch.arange(length, device=hidden_BTD.device)
        return (mix64(sample_ids_B)[:, None] + column_T).flatten()


def entropy_model_of(config: MMaDAConfig) -> MMaDAForCausalLM | None:
    """The small model of bytes that sets patch boundaries, where the rule asks one."""
    if not config.patches.needs_entropy_model:
        return None
    small = MMaDAConfig(**config.patches.entropy_model)
    small._attn_implementation = config._attn_implementation
    return MMaDAForCausalLM(small)


class MMaDAForCausalLM(TrainableModel, GenerationMixin):
    """The language model: hidden states to logits, and the loss that training minimises."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config)
        self.model = MMaDAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False)
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
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden, num_patches = outputs.last_hidden_state, getattr(outputs, "num_patches", None)
        logits = self.logits_of(hidden[:, kept])
        result = MMaDAOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            num_patches=num_patches,
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
        result.loss, result.lm_loss, result.parts = lm_loss, lm_loss.detach(), {"language_model": lm_loss}
        if self.training and outputs.router_logits:
            self._add_router_losses(result, attention_mask, hidden.shape[1])
        return result

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., D) to logits (..., V), capped where the config says so."""
        logits, cap = self.lm_head(hidden), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """Give ``generate`` a cache that holds any mixture of layers."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation} cannot hold every kind of layer; "
                "leave it out"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            checked_cache(given)._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = model_kwargs["past_key_values"] = MMaDACache(self.config.num_hidden_layers)
            if generation_config.is_assistant:
                cache.activate_past_recording()


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
