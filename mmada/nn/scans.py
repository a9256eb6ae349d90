"""State-space recurrences, each as the plain loop that defines it and in a fast form that equals it.

Both are h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t · h_t + D x_t: B̄ is Euler's Δ B, as in the papers' code,
not the zero-order hold in their text. They differ in A: one number per channel and state (selective scan), or one per
head (SSD), which turns most of the work into matrix products.

Everything is computed in float32 or wider whatever the inputs' dtype, and under autocast, too. A token with Δ = 0
leaves the state as it is, so padding gets Δ = 0. Where ``starts_BT`` is True the state before the token is forgotten.

The fast forms go through the tokens in blocks that fit a processor's cache. Backward goes through them once more, so
that what is kept are the states between blocks (or chunks), never one per token.

# B batch, T tokens, I channels, N state size, H heads, P head width, G groups of heads,
# X channels of a group's heads, Z chunks, Q tokens in a chunk or block
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mmada.nn.blocks import blocks


def _widened(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan with its inputs in float32, or in the widest dtype among them if that is wider, and autocast off."""

    @wraps(scan)
    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.float32
        for value in chain(args, kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                dtype = torch.promote_types(dtype, value.dtype)

        def widen(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        with torch.autocast(args[0].device.type, enabled=False):
            return scan(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})

    return run


@_widened
def selective_scan_reference(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor,
    state_BIN: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba (arXiv:2312.00752, algorithm 2), token by token.

    Returns y (B, T, I) and the state after the last token (B, I, N); ``state_BIN`` is the one before the first.
    """
    h_BIN = x_BTI.new_zeros(x_BTI.shape[0], *A_IN.shape) if state_BIN is None else state_BIN
    outputs = []
    for t in range(x_BTI.shape[1]):
        if starts_BT is not None:
            h_BIN = h_BIN.masked_fill(starts_BT[:, t, None, None], 0.0)
        decay_BIN = torch.exp(dt_BTI[:, t, :, None] * A_IN)
        h_BIN = decay_BIN * h_BIN + (dt_BTI[:, t] * x_BTI[:, t])[..., None] * B_BTN[:, t, None]
        outputs.append((h_BIN * C_BTN[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1) + D_I * x_BTI, h_BIN


@_widened
def selective_scan(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor,
    state_BIN: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``selective_scan_reference``, in blocks of tokens."""
    if x_BTI.shape[1] == 1:
        return selective_scan_reference(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, state_BIN, starts_BT)
    if state_BIN is None:
        state_BIN = x_BTI.new_zeros(x_BTI.shape[0], *A_IN.shape)
    # Time first, so that a step is one piece of memory; channels last, so that the loops inside it are long.
    by_time = [tensor.transpose(0, 1).contiguous() for tensor in (dt_BTI * x_BTI, dt_BTI, B_BTN, C_BTN)]
    starts_TB = None if starts_BT is None else starts_BT.transpose(0, 1)
    y_TBI, last_BNI = _SelectiveScan.apply(*by_time, A_IN.mT.contiguous(), state_BIN.mT.contiguous(), starts_TB)
    return torch.addcmul(y_TBI.transpose(0, 1), D_I, x_BTI), last_BNI.mT


class _SelectiveScan(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t-1} + B_t u_t, y_t = C_t · h_t where u = Δ x; returns y (T, B, I) and last h (B, N, I)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor, starts: Any) -> Any:
        y_TBI = torch.empty_like(u)
        before = []
        for piece in blocks(len(u), state.numel(), u):
            before.append(state)
            _, h_QBNI = _block_states(piece, u, dt, B, A, state, starts)
            torch.matmul(C[piece, :, None], h_QBNI, out=y_TBI[piece, :, None])
            state = h_QBNI[-1].clone()
        ctx.starts = starts
        ctx.save_for_backward(u, dt, B, C, A, *before)
        return y_TBI, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Any:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _selective_scan_backward(ctx.starts, grad_y, grad_state, *ctx.saved_tensors)


def _selective_scan_backward(
    starts: Tensor | None,
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    *before: Tensor,
) -> tuple[Tensor | None, ...]:
    grad_u, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (u, dt, B, C))
    grad_A = torch.zeros_like(A)
    for piece, state in reversed(list(zip(blocks(len(u), before[0].numel(), u), before, strict=True))):
        decay_QBNI, h_QBNI = _block_states(piece, u, dt, B, A, state, starts)
        torch.matmul(h_QBNI, grad_y[piece, :, :, None], out=grad_C[piece, :, :, None])
        grad_h = C[piece, :, :, None] * grad_y[piece, :, None]
        grad_h[-1] += grad_state
        for t in reversed(range(len(grad_h) - 1)):
            grad_h[t].addcmul_(decay_QBNI[t + 1], grad_h[t + 1])
        torch.matmul(grad_h, u[piece, :, :, None], out=grad_B[piece, :, :, None])
        torch.matmul(B[piece, :, None], grad_h, out=grad_u[piece, :, None])
        grad_log_decay = grad_h.mul_(decay_QBNI)
        grad_state = grad_log_decay[0].clone()
        grad_log_decay[1:] *= h_QBNI[:-1]
        grad_log_decay[0] *= state
        torch.sum(grad_log_decay * A, dim=2, out=grad_dt[piece])
        grad_A += (grad_log_decay * dt[piece, :, None]).sum(dim=(0, 1))
    return grad_u, grad_dt, grad_B, grad_C, grad_A, grad_state, None


def _block_states(
    piece: slice, u: Tensor, dt: Tensor, B: Tensor, A: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Decays and states of a block of tokens, each (Q, B, N, I), from the state (B, N, I) before it."""
    decay_QBNI = (dt[piece, :, None] * A).exp_()
    if starts is not None:
        decay_QBNI.masked_fill_(starts[piece, :, None, None], 0.0)
    h_QBNI = B[piece, :, :, None] * u[piece, :, None]
    for h_BNI, decay_BNI in zip(h_QBNI.unbind(), decay_QBNI.unbind(), strict=True):
        state = h_BNI.addcmul_(decay_BNI, state)
    return decay_QBNI, h_QBNI


@_widened
def ssd_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2 (arXiv:2405.21060), token by token; head h reads group h // (H / G).

    Returns y (B, T, H, P) and the state after the last token (B, H, P, N); ``state_BHPN`` is the one before the first.
    """
    batch, length, heads, width = x_BTHP.shape
    B_BTHN, C_BTHN = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (B_BTGN, C_BTGN))
    h_BHPN = x_BTHP.new_zeros(batch, heads, width, B_BTGN.shape[3]) if state_BHPN is None else state_BHPN
    outputs = []
    for t in range(length):
        if starts_BT is not None:
            h_BHPN = h_BHPN.masked_fill(starts_BT[:, t, None, None, None], 0.0)
        decay_BH = torch.exp(dt_BTH[:, t] * A_H)
        new_BHPN = (dt_BTH[:, t, :, None] * x_BTHP[:, t])[..., None] * B_BTHN[:, t, :, None]
        h_BHPN = decay_BH[..., None, None] * h_BHPN + new_BHPN
        outputs.append((h_BHPN @ C_BTHN[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1) + D_H[:, None] * x_BTHP, h_BHPN


@_widened
def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """As ``ssd_reference``, in chunks: inside one by matrix products, from one to the next by the recurrence.

    Section 6 of arXiv:2405.21060. Linear in T.
    """
    batch, length, heads, width = x_BTHP.shape
    if length == 1:
        return ssd_reference(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, starts_BT)
    chunks = math.ceil(length / chunk_size)
    size = math.ceil(length / chunks)  # chunks of one size, with the least padding

    def chunked(tensor: Tensor) -> Tensor:
        if padding := chunks * size - length:
            tensor = pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, padding))
        return tensor.unflatten(1, (chunks, size))

    groups, num_states = B_BTGN.shape[2:]
    if state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(batch, heads, width, num_states)
    y_BZQHP, last_BGNX = _SSD.apply(
        *(chunked(tensor) for tensor in (x_BTHP, dt_BTH, B_BTGN, C_BTGN)),
        A_H,
        D_H,
        state_BHPN.reshape(batch, groups, -1, num_states).mT,
        None if starts_BT is None else chunked(starts_BT),
    )
    return y_BZQHP.flatten(1, 2)[:, :length], last_BGNX.mT.reshape(batch, heads, width, num_states)


def segsum(log_decay_T: Tensor) -> Tensor:
    """(..., T) to (..., T, T): at [s, t] the sum of log decays over s < k <= t, and -inf where t < s.

    Masked, then summed: differences of cumulative sums would lose the digits of small sums to large ones.
    """
    length = log_decay_T.shape[-1]
    later_TT = torch.ones(length, length, dtype=torch.bool, device=log_decay_T.device).triu(1)
    sums = log_decay_T[..., None, :].masked_fill(~later_TT, 0.0).cumsum(-1)
    return sums.masked_fill_(later_TT.mT, -torch.inf)


class _SSD(torch.autograd.Function):
    """x, Δ, B, C, starts in chunks (B, Z, Q, ...); A, D (H,); state (B, G, N, X). Returns y as x and the last state."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, state: Tensor, starts: Any
    ) -> Any:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        states = [state]  # before each chunk, and after the last
        for piece in _chunk_blocks(x):
            chunk = _Chunks(piece, x, dt, B, C, A, starts)
            added_BZGNX = chunk.B_BZGQN.mT @ chunk.by_group(chunk.u_BZQHP * chunk.to_end_BZQH1)
            first = len(states) - 1
            for z, through_BGX in enumerate(chunk.through_BZGX.unbind(1)):
                states.append(torch.addcmul(added_BZGNX[:, z], through_BGX[:, :, None], states[-1]))
            recalled = chunk.by_head(chunk.C_BZGQN @ torch.stack(states[first:-1], dim=1))
            inside = (chunk.weights_BZHQQ().mT @ chunk.u_BZQHP.transpose(2, 3)).transpose(2, 3)
            y[:, piece] = inside.addcmul_(recalled, chunk.from_start_BZQH1).addcmul_(D[:, None], x[:, piece])
        ctx.starts = starts
        ctx.save_for_backward(x, dt, B, C, A, D, y, torch.stack(states, dim=1))
        return y, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Any:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _ssd_backward(ctx.starts, grad_y, grad_state, *ctx.saved_tensors)


class _Chunks:
    """A block of chunks, laid out for matrix products."""

    def __init__(
        self, piece: slice, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, starts: Tensor | None
    ) -> None:
        self.num_groups, self.num_heads = B.shape[3], x.shape[3]
        self.u_BZQHP = dt[:, piece, ..., None] * x[:, piece]
        self.B_BZGQN, self.C_BZGQN = B[:, piece].transpose(2, 3), C[:, piece].transpose(2, 3)
        log_decay_BZHQ = (dt[:, piece] * A).transpose(2, 3)
        if starts is not None:
            log_decay_BZHQ.masked_fill_(starts[:, piece, None], -torch.inf)
        self.decay_BZHQQ = segsum(log_decay_BZHQ).exp_()  # from source (row) to target
        self.to_end_BZQH1 = self.decay_BZHQQ[..., -1].transpose(2, 3)[..., None].clone()
        self.from_start_BZQH1 = log_decay_BZHQ.cumsum(-1).exp_().transpose(2, 3)[..., None]
        through_BZHP = self.from_start_BZQH1[:, :, -1].expand(-1, -1, -1, x.shape[4])
        self.through_BZGX = through_BZHP.flatten(2).unflatten(2, (self.num_groups, -1))

    def weights_BZHQQ(self) -> Tensor:
        """Attention of target (column) to source (row): decay times B · C. Takes the place of ``decay_BZHQQ``."""
        scores_BZGQQ = self.B_BZGQN @ self.C_BZGQN.mT
        grouped = self.decay_BZHQQ.unflatten(2, (self.num_groups, -1))
        return grouped.mul_(scores_BZGQQ[:, :, :, None]).flatten(2, 3)

    def by_group(self, tensor_BZQHP: Tensor) -> Tensor:
        """To (B, Z, G, Q, X)."""
        return tensor_BZQHP.flatten(3).unflatten(3, (self.num_groups, -1)).transpose(2, 3)

    def by_head(self, tensor_BZGQX: Tensor) -> Tensor:
        """Back to (B, Z, Q, H, P)."""
        return tensor_BZGQX.transpose(2, 3).flatten(3).unflatten(3, (self.num_heads, -1))


def _ssd_backward(
    starts: Tensor | None,
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor,
    y: Tensor,
    states_BZGNX: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradient of a log decay needs no sum over pairs of tokens.

    y, and the last state, are sums over paths from a source to a target, and a path's weight is the product of the
    decays that it crosses. Those that cross decay k are those to targets >= k without those from sources >= k, and
    gradient times value, summed over the paths to one target (or from one source), is ∂y·y there (or ∂u·u).
    """
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
    grad_A, grad_D = torch.zeros_like(A), torch.zeros_like(D)
    for piece in reversed(_chunk_blocks(x)):
        chunk = _Chunks(piece, x, dt, B, C, A, starts)
        u, x_BZQHP, dt_BZQH, grad_y_BZQHP = chunk.u_BZQHP, x[:, piece], dt[:, piece], grad_y[:, piece]
        before_BZGNX, after_BZGNX = states_BZGNX[:, piece], states_BZGNX[:, piece.start + 1 : piece.stop + 1]

        # From chunk to chunk, backwards.
        recalled_BZGQX = chunk.by_group(grad_y_BZQHP * chunk.from_start_BZQH1)
        from_chunk_BZGNX = chunk.C_BZGQN.mT @ recalled_BZGQX
        grad_after_BZGNX = torch.empty_like(from_chunk_BZGNX)
        for z in reversed(range(from_chunk_BZGNX.shape[1])):
            grad_after_BZGNX[:, z] = grad_state
            grad_state = torch.addcmul(from_chunk_BZGNX[:, z], chunk.through_BZGX[:, z, :, None], grad_state)
        added_BZGQX = chunk.by_group(u * chunk.to_end_BZQH1)
        grad_u_BZQHP = chunk.by_head(chunk.B_BZGQN @ grad_after_BZGNX) * chunk.to_end_BZQH1

        # Inside chunks.
        grad_y_BZHQP = grad_y_BZQHP.transpose(2, 3).contiguous()
        grad_scores_BZHQQ = (u.transpose(2, 3) @ grad_y_BZHQP.mT).mul_(chunk.decay_BZHQQ)
        grad_scores_BZGQQ = grad_scores_BZHQQ.unflatten(2, (chunk.num_groups, -1)).sum(3)
        grad_u_BZQHP += (chunk.weights_BZHQQ() @ grad_y_BZHQP).transpose(2, 3)
        grad_B_BZGQN = added_BZGQX @ grad_after_BZGNX.mT + grad_scores_BZGQQ @ chunk.C_BZGQN
        grad_C_BZGQN = recalled_BZGQX @ before_BZGNX.mT + grad_scores_BZGQQ.mT @ chunk.B_BZGQN
        grad_B[:, piece], grad_C[:, piece] = grad_B_BZGQN.transpose(2, 3), grad_C_BZGQN.transpose(2, 3)

        # Decays.
        x_by_grad_u_BZQH, x_by_grad_y_BZQH = (x_BZQHP * grad_u_BZQHP).sum(-1), (x_BZQHP * grad_y_BZQHP).sum(-1)
        to_target_BZQH = (y[:, piece] * grad_y_BZQHP).sum(-1) - D * x_by_grad_y_BZQH
        net_BZQH = to_target_BZQH - dt_BZQH * x_by_grad_u_BZQH
        net_BZQH[:, :, -1] += (after_BZGNX * grad_after_BZGNX).sum(3).flatten(2).unflatten(2, (x.shape[3], -1)).sum(-1)
        grad_log_decay_BZQH = net_BZQH.flip(2).cumsum(2).flip(2)
        if starts is not None:
            grad_log_decay_BZQH.masked_fill_(starts[:, piece, :, None], 0.0)
        grad_dt[:, piece] = x_by_grad_u_BZQH + A * grad_log_decay_BZQH
        grad_A += (dt_BZQH * grad_log_decay_BZQH).sum(dim=(0, 1, 2))
        grad_D += x_by_grad_y_BZQH.sum(dim=(0, 1, 2))
        grad_x[:, piece] = torch.addcmul(dt_BZQH[..., None] * grad_u_BZQHP, D[:, None], grad_y_BZQHP)
    return grad_x, grad_dt, grad_B, grad_C, grad_A, grad_D, grad_state, None


def _chunk_blocks(x_BZQHP: Tensor) -> list[slice]:
    batch, chunks, size, heads, _ = x_BZQHP.shape
    return blocks(chunks, batch * heads * size * size, x_BZQHP)
