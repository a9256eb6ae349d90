"""The experts of a mixture-of-experts layer: SwiGLU feed-forwards, each on the tokens routed to it, none dropped.

``expert_ffn_reference`` says what is computed, ``expert_ffn`` computes it fast; ``expert_ffn_sorted_reference`` and
``expert_ffn_sorted`` are the same for tokens that are sorted by expert already, as after an expert-parallel exchange.
``mmada bench moe`` prints what the fast path costs beside its peers and a dense feed-forward.

The fast path orders the routed tokens by expert and goes through them in waves: runs of neighbouring experts whose
intermediate values stay in the cache. Two buffers of N rows live on to the backward pass (the projections before the
activation, and the outputs before they are weighted); gathered inputs and activations are made again there.

# T tokens, K experts per token, E experts, D model width, F hidden width of an expert
# N routed tokens (T * K), ordered by expert; W those of one wave
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmada.nn.buffers import empty_rows, empty_weights

# Values of the gate and up projections held by one wave. 2 MiB in float32, about one core's second-level cache:
# of 2^17 .. 2^21 and no waves at all, 2^19 was the fastest or within 2 % of it at each shape of `mmada bench moe`.
WAVE_NUMEL = 1 << 19


class Experts(nn.Module):
    """E SwiGLU feed-forwards, ``down(silu(gate x) * up x)``, in the tensor layout of transformers' expert blocks.

    ``gate_up_proj`` is (E, 2F, D), of which rows 0 .. F-1 are the gate; ``down_proj`` is (E, D, F). ``act_fn`` is
    there for tools that ask which activation the experts have.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, moe_intermediate_size: int, initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * moe_intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, moe_intermediate_size))
        self.act_fn = nn.SiLU()
        nn.init.normal_(self.gate_up_proj, std=initializer_range)
        nn.init.normal_(self.down_proj, std=initializer_range)

    def forward(self, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor) -> Tensor:
        """Each token's K experts, weighted and summed: (T, D). See ``expert_ffn``."""
        return expert_ffn(hidden_TD, top_k_index_TK, top_k_weights_TK, self.gate_up_proj, self.down_proj)

    def extra_repr(self) -> str:
        num_experts, hidden_size, width = self.down_proj.shape
        return f"num_experts={num_experts}, hidden_size={hidden_size}, moe_intermediate_size={width}"


def expert_ffn_reference(
    hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """What ``expert_ffn`` computes, as a plain loop over the experts; same arguments."""
    output_TD = torch.zeros_like(hidden_TD)
    for expert, (w_in, w_down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, choice = torch.where(top_k_index_TK == expert)
        gate, up = F.linear(hidden_TD[token], w_in).chunk(2, dim=-1)
        result = F.linear(F.silu(gate) * up, w_down) * top_k_weights_TK[token, choice, None]
        output_TD = output_TD.index_add(0, token, result)
    return output_TD


def expert_ffn(
    hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """Run each token through its K experts and add up the weighted results.

    The order of every sum is fixed, so the same inputs give the same bits. Once differentiable.

    Args:
        hidden_TD: tokens (T, D), T may be 0.
        top_k_index_TK: experts of each token (T, K), integers in [0, E).
        top_k_weights_TK: their weights (T, K).
        gate_up_proj: gate and up projections (E, 2F, D), the gate first.
        down_proj: down projections (E, D, F).

    Returns:
        (T, D) in the dtype of ``hidden_TD``, or in that of autocast where it is on.

    Raises:
        ValueError: an index is not that of an expert.
    """
    with _plain_precision(hidden_TD) as dtype:
        hidden_TD, weights_TK = hidden_TD.to(dtype), top_k_weights_TK.to(dtype)
        route = _route(top_k_index_TK, down_proj.shape[0])
        if _has_grouped_mm(hidden_TD, down_proj):
            rows_ND = _GatherRows.apply(hidden_TD, route.token_N, route.position_TK)
            result_ND = _grouped_swiglu(rows_ND, route.ends_E, down_proj.to(dtype), gate_up_proj.to(dtype))
            result_ND = _GatherRows.apply(result_ND, route.position_TK.flatten(), route.order_N[:, None])
            return (result_ND.unflatten(0, weights_TK.shape) * weights_TK[..., None]).sum(dim=1)
        segments = _Segments.of_ends(route.ends_E, gate_up_proj.shape[1])
        if segments.num_rows != route.order_N.numel() or (top_k_index_TK.numel() and int(top_k_index_TK.min()) < 0):
            raise ValueError(
                f"top_k_index holds {int(top_k_index_TK.min())} .. {int(top_k_index_TK.max())}, "
                f"but the experts are 0 .. {down_proj.shape[0] - 1}"
            )
        projections = down_proj.to(dtype), gate_up_proj.to(dtype)
        keep = _will_differentiate(hidden_TD, weights_TK, *projections)
        return _SegmentedSwiGLU.apply(segments, keep, hidden_TD, weights_TK, *route.tensors(), *projections)


def expert_ffn_sorted_reference(
    hidden_ND: Tensor, counts_E: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """What ``expert_ffn_sorted`` computes, as a plain loop over the experts; same arguments."""
    results, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        rows = hidden_ND[start : start + count]
        inner = F.silu(F.linear(rows, w_gate[expert])) * F.linear(rows, w_up[expert])
        results.append(F.linear(inner, w_down[expert]))
        start += count
    return torch.cat([*results, torch.zeros_like(hidden_ND[start:])])


def expert_ffn_sorted(hidden_ND: Tensor, counts_E: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Run tokens that lie sorted by expert through their experts.

    Args:
        hidden_ND: tokens (N, D): those of expert 0, of expert 1, and so on; what is left over at the end is padding.
        counts_E: tokens of each expert (E,), integers; their sum is at most N.
        w_gate: gate projections (E, F, D).
        w_up: up projections (E, F, D).
        w_down: down projections (E, D, F).

    Returns:
        (N, D), zero in the padding rows; the padding gets zero gradient. dtype as for ``expert_ffn``.

    Raises:
        ValueError: the counts add up to more than N.
    """
    with _plain_precision(hidden_ND) as dtype:
        hidden_ND = hidden_ND.to(dtype)
        projections = w_down.to(dtype), w_gate.to(dtype), w_up.to(dtype)
        ends_E = counts_E.cumsum(0)
        if _has_grouped_mm(hidden_ND, w_down):
            padding_N = torch.arange(hidden_ND.shape[0], device=hidden_ND.device) >= ends_E[-1]
            # Masked on both sides: grouped_mm leaves these rows of its output, and of its gradient, as it finds them.
            rows_ND = hidden_ND.masked_fill(padding_N[:, None], 0)
            return _grouped_swiglu(rows_ND, ends_E, *projections).masked_fill(padding_N[:, None], 0)
        segments = _Segments.of_ends(ends_E, w_gate.shape[1] + w_up.shape[1])
        if segments.num_rows > hidden_ND.shape[0]:
            raise ValueError(f"counts add up to {segments.num_rows}, but there are {hidden_ND.shape[0]} tokens")
        keep = _will_differentiate(hidden_ND, *projections)
        return _SegmentedSwiGLU.apply(segments, keep, hidden_ND, None, None, None, None, *projections)
