"""The selective scan of Mamba: the plain loop that defines it, and a fast form that equals it.

h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t · h_t + D x_t, for every channel by itself, with a decay for each of
its N numbers. B̄ is Euler's Δ B, as in the paper's code, not the zero-order hold in its text.

Computed in float32 at least. A token with Δ = 0 leaves the state as it is, so padding gets Δ = 0. Where ``starts_BT``
is True the state before the token is forgotten.

# B batch, T tokens, I channels, N state size, Q tokens in a block
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmada.nn.blocks import blocks
from mmada.nn.precision import SMALLEST_LOG_DECAY, widened


@widened
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
    scan = selective_scan_reference if x_BTI.shape[1] == 1 else _selective_scan_in_blocks
    return scan(x_BTI, dt_BTI, A_IN, B_BTN, C_BTN, D_I, state_BIN, starts_BT)


@widened
def _selective_scan_in_blocks(
    x_BTI: Tensor,
    dt_BTI: Tensor,
    A_IN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_I: Tensor,
    state_BIN: Tensor | None,
    starts_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
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
        later, *earlier = reversed(list(zip(grad_h.unbind(), decay_QBNI.unbind(), strict=True)))
        for grad_BNI, decay_BNI in earlier:
            grad_BNI.addcmul_(later[1], later[0])
            later = (grad_BNI, decay_BNI)
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
    decay_QBNI = (dt[piece, :, None] * A).clamp_(min=SMALLEST_LOG_DECAY).exp_()
    if starts is not None:
        decay_QBNI.masked_fill_(starts[piece, :, None, None], 0.0)
    h_QBNI = B[piece, :, :, None] * u[piece, :, None]
    for h_BNI, decay_BNI in zip(h_QBNI.unbind(), decay_QBNI.unbind(), strict=True):
        state = h_BNI.addcmul_(decay_BNI, state)
    return decay_QBNI, h_QBNI
