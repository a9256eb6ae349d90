"""State-space duality, the recurrence of Mamba-2: the plain loop that defines it, and a fast form that equals it.

h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_tᵀ, y_t = h_t C_t + D x_t, with one decay per head (arXiv:2405.21060). Inside a
chunk of tokens that is attention with C as queries and B as keys, so most of the work is matrix products.

Computed in float32 at least. A token with Δ = 0 leaves the state as it is, so padding gets Δ = 0. Where ``starts_BT``
is True the state before the token is forgotten.

# B batch, T tokens, N state size, H heads, P head width, G groups of heads, X channels of a group's heads,
# Z chunks, Q tokens in a chunk
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mmada.nn.blocks import blocks
from mmada.nn.precision import SMALLEST_LOG_DECAY, widened


@widened
def ssd_reference(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk_size: int = 32,
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


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """As ``ssd_reference``, in chunks: inside one by matrix products, from one to the next by the recurrence.

    Section 6 of arXiv:2405.21060. Linear in T.
    """
    scan = ssd_reference if x_BTHP.shape[1] == 1 else _ssd_in_chunks
    return scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, starts_BT, chunk_size)


@widened
def _ssd_in_chunks(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None,
    starts_BT: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x_BTHP.shape
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


def segment_decays(log_decay_T: Tensor) -> Tensor:
    """(..., T) to (..., T, T): at [s, t] exp of the sum of log decays over s < k <= t, and 0 where t < s.

    Masked, then summed: differences of cumulative sums would lose the digits of small sums to large ones.
    """
    upper_TT = log_decay_T.new_ones(log_decay_T.shape[-1:] * 2).triu()
    segsum = (log_decay_T[..., None, :] * upper_TT.triu(1)).cumsum(-1)
    return segsum.clamp_(min=SMALLEST_LOG_DECAY).exp_().mul_(upper_TT)


class _SSD(torch.autograd.Function):
    """x, Δ, B, C, starts in chunks (B, Z, Q, ...); A, D (H,); state (B, G, N, X). Returns y as x and the last state."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, state: Tensor, starts: Any
    ) -> Any:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        states_BZGNX = state.new_empty(len(state), x.shape[1] + 1, *state.shape[1:])  # around the chunks
        states_BZGNX[:, 0] = state
        for piece in _chunk_blocks(x):
            chunk = _Chunks(piece, x, dt, B, C, A, starts)
            added_BZGNX = chunk.B_BZGQN.mT @ chunk.by_group(chunk.u_BZQHP * chunk.to_end_BZQH1)
            around = states_BZGNX[:, piece.start : piece.stop + 1].unbind(1)
            parts = zip(added_BZGNX.unbind(1), chunk.through_BZG1X.unbind(1), around, around[1:], strict=False)
            for added_BGNX, through_BG1X, before_BGNX, after_BGNX in parts:
                torch.addcmul(added_BGNX, through_BG1X, before_BGNX, out=after_BGNX)
            recalled = chunk.by_head(chunk.C_BZGQN @ states_BZGNX[:, piece])
            inside = (chunk.weights_BZHQQ().mT @ chunk.u_BZQHP.transpose(2, 3)).transpose(2, 3)
            y[:, piece] = inside.addcmul_(recalled, chunk.from_start_BZQH1).addcmul_(D[:, None], x[:, piece])
        ctx.starts = starts
        ctx.save_for_backward(x, dt, B, C, A, D, states_BZGNX)
        return y, states_BZGNX[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> Any:
        with torch.autocast(grad_y.device.type, enabled=False):
            return _ssd_backward(ctx.starts, grad_y, grad_state, *ctx.saved_tensors)


class _Chunks:
    """A block of chunks, laid out for matrix products; pairs of tokens are [source, target]."""

    def __init__(
        self, piece: slice, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, starts: Tensor | None
    ) -> None:
        self.num_groups, self.num_heads = B.shape[3], x.shape[3]
        self.u_BZQHP = dt[:, piece, ..., None] * x[:, piece]
        self.B_BZGQN, self.C_BZGQN = B[:, piece].transpose(2, 3), C[:, piece].transpose(2, 3)
        self.scores_BZGQQ = self.B_BZGQN @ self.C_BZGQN.mT
        log_decay_BZHQ = (dt[:, piece] * A).transpose(2, 3)
        self.decay_BZHQQ = segment_decays(log_decay_BZHQ)
        from_start_BZHQ = log_decay_BZHQ.cumsum(-1).clamp_(min=SMALLEST_LOG_DECAY).exp_()
        if starts is not None:
            document_BZQ = starts[:, piece].cumsum(-1)
            self.decay_BZHQQ *= (document_BZQ[..., None] == document_BZQ[..., None, :])[:, :, None]
            from_start_BZHQ *= (document_BZQ == 0)[:, :, None]
        self.from_start_BZQH1 = from_start_BZHQ.transpose(2, 3)[..., None]
        self.to_end_BZQH1 = self.decay_BZHQQ[..., -1].transpose(2, 3)[..., None].clone()
        through_BZHP = from_start_BZHQ[..., -1:].expand(-1, -1, -1, x.shape[4])
        self.through_BZG1X = through_BZHP.flatten(2).unflatten(2, (self.num_groups, 1, -1))

    def weights_BZHQQ(self) -> Tensor:
        """Attention of targets to sources. Takes the place of ``decay_BZHQQ``."""
        return self.by_scores(self.decay_BZHQQ)

    def by_scores(self, tensor_BZHQQ: Tensor) -> Tensor:
        """Times B · C, in place."""
        grouped = tensor_BZHQQ.unflatten(2, (self.num_groups, -1))
        return grouped.mul_(self.scores_BZGQQ[:, :, :, None]).flatten(2, 3)

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
    states_BZGNX: Tensor,
) -> tuple[Tensor | None, ...]:
    grad_x, grad_dt, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, dt, B, C))
    grad_A, grad_D = torch.zeros_like(A), torch.zeros_like(D)
    for piece in reversed(_chunk_blocks(x)):
        chunk = _Chunks(piece, x, dt, B, C, A, starts)
        u, x_BZQHP, dt_BZQH, grad_y_BZQHP = chunk.u_BZQHP, x[:, piece], dt[:, piece], grad_y[:, piece]
        before_BZGNX = states_BZGNX[:, piece]

        # From chunk to chunk, backwards.
        grad_recalled_BZQHP = grad_y_BZQHP * chunk.from_start_BZQH1
        grad_recalled_BZGQX = chunk.by_group(grad_recalled_BZQHP)
        from_targets_BZGNX = chunk.C_BZGQN.mT @ grad_recalled_BZGQX
        grad_states_BZGNX = pad(from_targets_BZGNX, (0, 0) * 3 + (0, 1))
        grad_states_BZGNX[:, -1] = grad_state
        around = grad_states_BZGNX.unbind(1)
        parts = zip(chunk.through_BZG1X.unbind(1), around, around[1:], strict=False)
        for through_BG1X, grad_before_BGNX, grad_after_BGNX in reversed(list(parts)):
            grad_before_BGNX.addcmul_(through_BG1X, grad_after_BGNX)
        grad_state, grad_after_BZGNX = grad_states_BZGNX[:, 0], grad_states_BZGNX[:, 1:]
        kept_BZGQX = chunk.by_group(u * chunk.to_end_BZQH1)
        grad_u_BZQHP = chunk.by_head(chunk.B_BZGQN @ grad_after_BZGNX) * chunk.to_end_BZQH1

        # What the paths from sources to targets give to the gradient of the log decays that they cross: those over
        # chunks here, those inside one below. Only sums of what crosses, no differences, which would lose digits.
        recalled_BZQHP = chunk.by_head(chunk.C_BZGQN @ before_BZGNX)
        to_target_BZQH = (recalled_BZQHP * grad_recalled_BZQHP).sum(-1)
        from_source_BZQH = (u * grad_u_BZQHP).sum(-1)
        over_BZGX = (before_BZGNX * grad_after_BZGNX).sum(3) * chunk.through_BZG1X[:, :, :, 0]
        grad_log_decay_BZQH = over_BZGX.flatten(2).unflatten(2, (x.shape[3], -1)).sum(-1)[:, :, None]
        grad_log_decay_BZQH = grad_log_decay_BZQH + to_target_BZQH.flip(2).cumsum(2).flip(2)
        grad_log_decay_BZQH[:, :, 1:] += from_source_BZQH[:, :, :-1].cumsum(2)

        # Inside chunks.
        grad_y_BZHQP = grad_y_BZQHP.transpose(2, 3).contiguous()
        grad_scores_BZHQQ = (u.transpose(2, 3) @ grad_y_BZHQP.mT).mul_(chunk.decay_BZHQQ)
        grad_scores_BZGQQ = grad_scores_BZHQQ.unflatten(2, (chunk.num_groups, -1)).sum(3)
        grad_u_BZQHP += (chunk.weights_BZHQQ() @ grad_y_BZHQP).transpose(2, 3)
        # At [s, t] the sum over sources up to s; decay s + 1 is crossed by those to later targets.
        crossing_BZHQQ = chunk.by_scores(grad_scores_BZHQQ).cumsum(-2).triu_(1)
        grad_log_decay_BZQH[:, :, 1:] += crossing_BZHQQ[..., :-1, :].sum(-1).transpose(2, 3)

        grad_B_BZGQN = kept_BZGQX @ grad_after_BZGNX.mT + grad_scores_BZGQQ @ chunk.C_BZGQN
        grad_C_BZGQN = grad_recalled_BZGQX @ before_BZGNX.mT + grad_scores_BZGQQ.mT @ chunk.B_BZGQN
        grad_B[:, piece], grad_C[:, piece] = grad_B_BZGQN.transpose(2, 3), grad_C_BZGQN.transpose(2, 3)
        grad_dt[:, piece] = (x_BZQHP * grad_u_BZQHP).sum(-1) + A * grad_log_decay_BZQH
        grad_A += (dt_BZQH * grad_log_decay_BZQH).sum(dim=(0, 1, 2))
        grad_D += (x_BZQHP * grad_y_BZQHP).sum(dim=(0, 1, 2, 4))
        grad_x[:, piece] = torch.addcmul(dt_BZQH[..., None] * grad_u_BZQHP, D[:, None], grad_y_BZQHP)
    return grad_x, grad_dt, grad_B, grad_C, grad_A, grad_D, grad_state, None


def _chunk_blocks(x_BZQHP: Tensor) -> list[slice]:
    batch, chunks, size, heads, _ = x_BZQHP.shape
    return blocks(chunks, batch * heads * size * size, x_BZQHP)
