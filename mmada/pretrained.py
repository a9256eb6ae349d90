"""What the whole models of the family have in common: saving, loading and initialising, and being trained on workers.

# B batch, T tokens, E experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.block import Block
from mmada.nn.experts import Experts
from mmada.nn.mixers.attention import Attention
from mmada.nn.router import RouterTap, selection_bias_of
from mmada.output import MMaDAOutput
from mmada.training.objectives.router import router_losses, without_padding


class MMaDAPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to save, load, cast and initialise the family."""

    config_class = MMaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # What we initialise with leaves loaded weights alone; transformers' precaution for code that does not would
        # pass over every module without tensors of its own, and so over what it has to say about its children.
        super()._initialize_weights(module)

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
        elif (init_own_weights := getattr(module, "init_own_weights", None)) is not None:
            init_own_weights(self.config)
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            init.zeros_(bias)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers' own. Raises ValueError with byte patches whose entropy model would not know the new ids."""
        known = self.config.vocab_size
        if self.config.patches.needs_entropy_model and new_num_tokens not in (None, known):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}): the entropy model of patches.mode="
                f"{self.config.patches.mode} knows {known} tokens; use patches.mode space or static"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class TrainableModel(MMaDAPreTrainedModel):
    """The trunk ``model`` with a head: what training with experts, on several workers, asks of every such model."""

    model: Any  # an MMaDAModel, whose module builds on this one
    # Classes of modules that call their children as often as the data wants. An engine that shards parameters must
    # gather theirs together: workers whose rows differ would wait for each other's calls.
    gathered_whole = ("MemoryContext",)
    # Sums a tensor of counts over all workers; set by whoever trains on several.
    reduce_load: Callable[[Tensor], Tensor] | None = None

    def _add_router_losses(self, result: MMaDAOutput, attention_mask: Tensor | None, length: int) -> None:
        blocks = [self.model.layers[index] for index in self.config.moe_layers]
        logits: list[Tensor] = list(result.router_logits)
        sequence_lengths: int | list[int] = length
        if result.num_patches is not None:
            sequence_lengths = result.num_patches.tolist()
        elif attention_mask is not None:  # if it hides nothing, too: workers must agree on what they add up
            logits, sequence_lengths = without_padding(logits, attention_mask[:, -length:].bool())
        losses = router_losses(
            logits,
            self.config.num_experts_per_tok,
            [selection_bias_of(block.mlp) for block in blocks],
            sequence_lengths,
            self.config.router_balance_scope,
            self.reduce_load,
        )
        result.aux_loss, result.z_loss = losses.balance.detach(), losses.z.detach()
        result.expert_load, result.source_balance = losses.load, losses.source_balance
        if result.parts is not None:
            result.parts |= {"router_balance": losses.balance, "router_z": losses.z}
        weights = self.config.router_aux_loss_coef, self.config.router_z_loss_coef
        result.loss = result.loss + weights[0] * losses.balance + weights[1] * losses.z

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
