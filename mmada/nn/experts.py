"""The experts of a mixture-of-experts layer: SwiGLU feed-forwards, each on the tokens routed to it, none dropped.

``expert_ffn_reference`` says what is computed, ``expert_ffn`` computes it fast; ``expert_ffn_sorted_reference`` and
``expert_ffn_sorted`` are the same for tokens that are sorted by expert already, as after an expert-parallel exchange.
``mmada bench moe`` prints what the fast path costs beside its peers and a dense feed-forward.

The fast path orders the routed tokens by expert and goes through them in waves: runs of neighbouring experts, so that
intermediate values need little memory however many tokens there are. Two buffers of N rows live on to the backward
pass (the projections before the activation, and the outputs before they are weighted); gathered inputs and
activations are made again there.

# T tokens, K experts per token, E experts, D model width, F hidden width of an expert
# N routed tokens (T * K), ordered by expert; W those of one wave
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmada.nn.buffers import empty

# Values of the gate and up projections held by one wave, 16 MiB in float32. On idle cores 2^19 .. 2^23 are within 3 %
# of each other at the shapes of `mmada bench moe`; on busy ones every operation is a barrier at which threads wait
# for one that is not running, and waves of 2^19 took up to twice as long as these.
WAVE_NUMEL = 1 << 22


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
    with _compute_dtype(hidden_TD) as dtype:
        hidden_TD, weights_TK = hidden_TD.to(dtype), top_k_weights_TK.to(dtype)
        w_down, w_in = down_proj.to(dtype), gate_up_proj.to(dtype)
        route = _route(top_k_index_TK, down_proj.shape[0])
        if _has_grouped_mm(hidden_TD, w_down):
            rows_ND = _GatherRows.apply(hidden_TD, route.token_N, route.position_TK)
            rows_ND = _grouped_swiglu(rows_ND, route.ends_E, w_down, w_in)
            rows_ND = _GatherRows.apply(rows_ND, route.position_TK.flatten(), route.order_N[:, None])
            return (rows_ND.unflatten(0, weights_TK.shape) * weights_TK[..., None]).sum(dim=1)
        waves = _waves(route.ends_E.tolist(), w_in.shape[1])
        saves = _will_differentiate(hidden_TD, weights_TK, w_down, w_in)
        return _WaveSwiGLU.apply(waves, saves, hidden_TD, weights_TK, route, w_down, w_in)


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
    with _compute_dtype(hidden_ND) as dtype:
        hidden_ND = hidden_ND.to(dtype)
        weights = w_down.to(dtype), w_gate.to(dtype), w_up.to(dtype)
        ends_E = counts_E.cumsum(0)
        if _has_grouped_mm(hidden_ND, w_down):
            padding_N = torch.arange(hidden_ND.shape[0], device=hidden_ND.device) >= ends_E[-1]
            # Masked on both sides: grouped_mm leaves these rows of its output, and of its gradient, as it finds them.
            rows_ND = hidden_ND.masked_fill(padding_N[:, None], 0)
            return _grouped_swiglu(rows_ND, ends_E, *weights).masked_fill(padding_N[:, None], 0)
        ends = ends_E.tolist()
        if ends[-1] > hidden_ND.shape[0]:
            raise ValueError(f"counts_E adds up to {ends[-1]}, but there are {hidden_ND.shape[0]} tokens")
        waves = _waves(ends, 2 * w_gate.shape[1])
        saves = _will_differentiate(hidden_ND, *weights)
        return _WaveSwiGLU.apply(waves, saves, hidden_ND, None, None, *weights)


class _Route(NamedTuple):
    """Where the routed tokens lie when they are ordered by expert; ties keep the order of the tokens."""

    order_N: Tensor  # row of the ordered tokens -> place in (T, K), flattened
    token_N: Tensor  # row of the ordered tokens -> token
    position_TK: Tensor  # the inverse of order_N
    ends_E: Tensor  # the row after each expert's last


def _route(index_TK: Tensor, num_experts: int) -> _Route:
    expert_N, order_N = index_TK.flatten().sort(stable=True)
    if not index_TK.is_cuda and index_TK.numel():  # on CUDA the question would stall the queue
        lowest, highest = expert_N[0].item(), expert_N[-1].item()
        if lowest < 0 or highest >= num_experts:
            raise ValueError(f"top_k_index holds {lowest} .. {highest}, but the experts are 0 .. {num_experts - 1}")
    places_N = torch.arange(order_N.numel(), device=order_N.device)
    experts_E = torch.arange(num_experts, device=order_N.device, dtype=expert_N.dtype)
    return _Route(
        order_N=order_N,
        token_N=order_N // index_TK.shape[1],
        position_TK=torch.empty_like(order_N).scatter_(0, order_N, places_N).view_as(index_TK),
        ends_E=torch.searchsorted(expert_N, experts_E, right=True),
    )


@dataclass(frozen=True)
class _Wave:
    """Neighbouring experts that are computed together."""

    experts: slice
    rows: slice
    counts: list[int]  # rows of each of these experts

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


def _waves(ends: Sequence[int], inner_width: int) -> list[_Wave]:
    """Cut the experts into waves of at most ``WAVE_NUMEL`` inner values, or of one expert with more than that."""
    most_rows = max(1, WAVE_NUMEL // inner_width)
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    waves, first, start = [], 0, 0
    for expert, end in enumerate(ends):
        if expert + 1 == len(ends) or ends[expert + 1] - start > most_rows:
            waves.append(_Wave(slice(first, expert + 1), slice(start, end), counts[first : expert + 1]))
            first, start = expert + 1, end
    return waves


class _WaveSwiGLU(torch.autograd.Function):
    """The loop over waves and experts, and its gradient.

    With a route the tokens are gathered wave by wave, and the results weighted and summed by ``embedding_bag`` (one
    pass, sums in a fixed order); without one they lie in order already. ``inward`` is the fused gate and up
    projection, or the two apart.
    """

    @staticmethod
    def forward(
        ctx: Any,
        waves: list[_Wave],
        saves: bool,
        hidden: Tensor,
        weights_TK: Tensor | None,
        route: _Route | None,
        w_down: Tensor,
        *inward: Tensor,
    ) -> Tensor:
        num_rows = hidden.shape[0] if route is None else route.order_N.numel()
        most_rows = max(wave.num_rows for wave in waves)
        _, width_D, width_F = w_down.shape
        x_WD = empty(hidden, most_rows, width_D)
        act_WF = empty(hidden, most_rows, width_F)
        inner = [empty(hidden, num_rows if saves else most_rows, w_in.shape[1]) for w_in in inward]
        result_ND = empty(hidden, num_rows, width_D)
        for wave in waves:
            x = _rows_of(hidden, wave, route, out=x_WD)
            projected = [each[wave.rows if saves else slice(wave.num_rows)] for each in inner]
            for w_in, result in zip(inward, projected, strict=True):
                _mm_each(x.split(wave.counts), w_in.mT[wave.experts], result.split(wave.counts))
            gate, up = _gate_and_up(projected)
            act = torch.ops.aten.silu.out(gate, out=act_WF[: wave.num_rows]).mul_(up)
            _mm_each(act.split(wave.counts), w_down.mT[wave.experts], result_ND[wave.rows].split(wave.counts))
        if saves:
            ctx.waves, ctx.num_inward = waves, len(inward)
            routing = () if route is None else (result_ND, weights_TK, *route)
            ctx.save_for_backward(hidden, w_down, *inward, *inner, *routing)
        if route is None or weights_TK is None:
            result_ND[waves[-1].rows.stop :].zero_()  # padding
            return result_ND
        return F.embedding_bag(route.position_TK, result_ND, per_sample_weights=weights_TK, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, w_down, *others = ctx.saved_tensors
        inward, inner = others[: ctx.num_inward], others[ctx.num_inward : 2 * ctx.num_inward]
        routing = others[2 * ctx.num_inward :]
        route = _Route(*routing[2:]) if routing else None
        _, _, needs_hidden, needs_weights, _, needs_down, *needs_inward = ctx.needs_input_grad

        num_rows, most_rows = inner[0].shape[0], max(wave.num_rows for wave in ctx.waves)
        _, width_D, width_F = w_down.shape
        x_WD, grad_WD = empty(hidden, most_rows, width_D), empty(hidden, most_rows, width_D)
        act_WF, grad_act_WF = empty(hidden, most_rows, width_F), empty(hidden, most_rows, width_F)
        grad_inner = [empty(hidden, most_rows, w_in.shape[1]) for w_in in inward]
        grad_ND = empty(hidden, num_rows, width_D) if needs_hidden else None
        grad_down = empty(w_down, *w_down.shape) if needs_down else None
        grad_inward = [empty(w, *w.shape) if n else None for w, n in zip(inward, needs_inward, strict=True)]
        if route is not None:
            result_ND, weights_TK = routing[:2]
            weight_N1 = weights_TK.flatten()[route.order_N][:, None]
            grad_weight_N = hidden.new_empty(num_rows)

        for wave in ctx.waves:
            rows, experts, counts = wave.rows, wave.experts, wave.counts
            grad_out = _rows_of(grad, wave, route, out=grad_WD)
            if route is not None:
                if needs_weights:
                    product = torch.mul(grad_out, result_ND[rows], out=x_WD[: wave.num_rows])
                    torch.sum(product, dim=1, out=grad_weight_N[rows])
                grad_out.mul_(weight_N1[rows])
            act, grad_act = act_WF[: wave.num_rows], grad_act_WF[: wave.num_rows]
            grad_projected = [each[: wave.num_rows] for each in grad_inner]
            _mm_each(grad_out.split(counts), w_down[experts], grad_act.split(counts))
            gate, up = _gate_and_up([each[rows] for each in inner])
            _swiglu_backward(gate, up, act, grad_act, *_gate_and_up(grad_projected))
            if grad_down is not None:
                _mm_each(grad_out.t().split(counts, dim=1), act.split(counts), grad_down[experts])
            x = _rows_of(hidden, wave, route, out=x_WD)
            for place, grad_result in enumerate(grad_projected):
                grad_in = grad_inward[place]
                if grad_in is not None:
                    _mm_each(grad_result.t().split(counts, dim=1), x.split(counts), grad_in[experts])
                if grad_ND is not None:
                    add = place > 0
                    _mm_each(grad_result.split(counts), inward[place][experts], grad_ND[rows].split(counts), add=add)

        if route is None:
            if grad_ND is not None:
                grad_ND[ctx.waves[-1].rows.stop :].zero_()  # padding
            return None, None, grad_ND, None, None, grad_down, *grad_inward
        grad_hidden = None if grad_ND is None else F.embedding_bag(route.position_TK, grad_ND, mode="sum")
        grad_weights = grad_weight_N[route.position_TK] if needs_weights else None
        return None, None, grad_hidden, grad_weights, None, grad_down, *grad_inward


def _rows_of(source: Tensor, wave: _Wave, route: _Route | None, *, out: Tensor) -> Tensor:
    """The wave's rows of ``source``: gathered into ``out`` along a route, else a view."""
    if route is None:
        return source[wave.rows]
    return torch.index_select(source, 0, route.token_N[wave.rows], out=out[: wave.num_rows])


def _gate_and_up(projected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two results, which lie side by side where the projections are fused."""
    gate, up = projected[0].chunk(2, dim=1) if len(projected) == 1 else projected
    return gate, up


def _mm_each(left: Iterable[Tensor], right: Iterable[Tensor], out: Iterable[Tensor], *, add: bool = False) -> None:
    """One matrix product for each expert, written (or added) to where it belongs; one over no rows writes zeros."""
    for a, b, result in zip(left, right, out, strict=True):
        if add:
            result.addmm_(a, b)
        else:
            torch.mm(a, b, out=result)


def _swiglu_backward(
    gate_WF: Tensor, up_WF: Tensor, act_WF: Tensor, grad_act_WF: Tensor, grad_gate_WF: Tensor, grad_up_WF: Tensor
) -> None:
    """From the gradient of the activation, fill in the activation itself and the gradients of gate and up.

    ``grad_act_WF`` is used up.
    """
    silu = torch.ops.aten.silu.out(gate_WF, out=act_WF)
    torch.mul(grad_act_WF, silu, out=grad_up_WF)
    act_WF.mul_(up_WF)
    grad_act_WF.mul_(up_WF)
    torch.ops.aten.silu_backward.grad_input(grad_act_WF, gate_WF, grad_input=grad_gate_WF)


class _GatherRows(torch.autograd.Function):
    """``rows[index_N]`` whose gradient is a gather and a sum, in fixed order, instead of a scatter.

    ``back_TK`` holds, for each of the T rows, the K places in ``index_N`` that read it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index_N: Tensor, back_TK: Tensor) -> Tensor:
        ctx.save_for_backward(back_TK)
        return rows.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back_TK,) = ctx.saved_tensors
        return grad.index_select(0, back_TK.flatten()).unflatten(0, back_TK.shape).sum(dim=1), None, None


def _grouped_swiglu(rows_ND: Tensor, ends_E: Tensor, w_down: Tensor, *inward: Tensor) -> Tensor:
    """The experts on tokens in order, by PyTorch's grouped matrix product: three (or four) kernels in all."""
    ends_E = ends_E.to(torch.int32)
    inner = [F.grouped_mm(rows_ND, weight.mT, offs=ends_E) for weight in inward]
    gate, up = _gate_and_up(inner)
    return F.grouped_mm(F.silu(gate) * up, w_down.mT, offs=ends_E)


def _has_grouped_mm(hidden: Tensor, w_down: Tensor) -> bool:
    """Whether ``grouped_mm`` has a kernel for these: CUDA from SM80 on, no float64, rows of a multiple of 16 bytes."""
    return (
        hidden.is_cuda
        and hidden.dtype != torch.float64
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and all(width * hidden.element_size() % 16 == 0 for width in w_down.shape[1:])
    )


def _will_differentiate(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@contextmanager
def _compute_dtype(hidden: Tensor) -> Iterator[torch.dtype]:
    """The dtype to compute in, and autocast off while we do: the casts are made by hand, once."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        yield hidden.dtype
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield dtype
