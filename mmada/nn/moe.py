"""The mixture of experts: a router, and the experts that it chooses.

The layout (a ``gate`` with a weight of (E, D), ``experts`` with fused ``gate_up_proj`` and ``down_proj``) is what
expert-parallel engines recognise; such an engine puts its own layer in this one's place, and what must live on
(noise, the record of the logits) therefore hangs on the gate from outside: see ``mmada.nn.router.RouterTap``.

# B batch, T tokens, D model, E experts, K chosen experts
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmada.config import MMaDAConfig
from mmada.nn.experts import Experts
from mmada.nn.router import choose_experts, selection_bias_of


class Gate(nn.Linear):
    """Router logits x Wᵀ, (T, D) to (T, E), in float32 at least.

    With loss-free balancing it carries the buffer ``e_score_correction_bias`` (E,), float32: it is added when
    experts are chosen and left out of their weights (arXiv:2408.15664).
    """

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        if config.router_bias_update_rate > 0:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        bias = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        moved = self._buffers.get("e_score_correction_bias")
        if bias is not None and moved is not None and moved.itemsize < 4:  # its small steps would be lost
            self._buffers["e_score_correction_bias"] = bias.to(moved.device)
        return self

    def forward(self, flat_TD: Tensor) -> Tensor:
        wide = torch.promote_types(flat_TD.dtype, torch.float32)
        return nn.functional.linear(flat_TD.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """Each token goes to its K best experts, whatever their load (dropless); (B, T, D) to (B, T, D)."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.router_normalizer = config.router_normalizer
        self.gate = Gate(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK, index_TK = choose_experts(
            self.gate(flat_TD),
            self.top_k,
            normalise=self.norm_topk_prob,
            selection_bias=selection_bias_of(self),
            normalizer=self.router_normalizer,
        )
        return self.experts(flat_TD, index_TK, weights_TK.to(flat_TD.dtype)).view_as(hidden_states)


def run_experts(mlp: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The experts of a block on tokens that were routed already, weighted and summed: (T, D).

    ``mlp`` is our block or the one that an expert-parallel engine put in its place. The engine's carries tokens to
    the workers that hold their experts, but routes them by a router of its own: for this one call that router
    answers what was decided here.
    """
    if not hasattr(mlp, "router"):
        return mlp.get_submodule("experts")(hidden_TD, index_TK, weights_TK.to(hidden_TD.dtype))
    with _routed(mlp, index_TK, weights_TK):
        return mlp(hidden_TD[None])[0]


@contextmanager
def _routed(mlp: Any, index_TK: Tensor, weights_TK: Tensor) -> Iterator[None]:
    """The engine's block with a router that answers (weights, index, tokens of each expert) as given.

    Its ``forward`` is covered for the time, so that the gate is not called again: the engine that shards parameters
    then still meets every module once.
    """
    counts_E = torch.zeros(mlp.num_experts, dtype=torch.int32, device=index_TK.device)
    counts_E.scatter_add_(0, index_TK.flatten(), torch.ones_like(index_TK, dtype=torch.int32).flatten())
    top_k, router = mlp.top_k, mlp.router
    mlp.top_k = index_TK.shape[1]
    router.forward = lambda *_: (weights_TK, index_TK, counts_E)
    try:
        yield
    finally:
        del router.forward  # the class's own shows again
        mlp.top_k = top_k
