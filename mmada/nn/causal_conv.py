"""Short depthwise convolution over the last tokens, each channel by itself.

# B batch, T tokens, C channels, K kernel, W = K - 1 + T inputs with those before the first token
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.blocks import blocks
from mmada.nn.context import Context
from mmada.nn.precision import wide


def causal_conv_reference(x_BWC: Tensor, weight_CK: Tensor, bias_C: Tensor, same_BTK: Tensor | None = None) -> Tensor:
    """y_t = Σ_k weight_k x_{t-K+1+k} + bias, (B, T, C); input t is at column t + K - 1.

    ``same_BTK``: False where the input under tap k of token t does not count. Sums in float32 at least.
    """
    taps_BTCK = wide(x_BWC).unfold(1, weight_CK.shape[1], 1)
    if same_BTK is not None:
        taps_BTCK = taps_BTCK * same_BTK[:, :, None]
    return ((taps_BTCK * weight_CK).sum(-1) + bias_C).to(x_BWC.dtype)


def causal_conv(x_BWC: Tensor, weight_CK: Tensor, bias_C: Tensor, same_BTK: Tensor | None = None) -> Tensor:
    """As ``causal_conv_reference``, block by block and without a copy for every tap.

    Tokens stay in front of channels: torch's own convolution wants them the other way round, and its backward is slow
    on a processor.
    """
    if x_BWC.shape[1] == weight_CK.shape[1]:  # a single token
        return causal_conv_reference(x_BWC, weight_CK, bias_C, same_BTK)
    return _CausalConv.apply(x_BWC, weight_CK, bias_C, same_BTK)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, same: Tensor | None) -> Tensor:
        batch, columns, channels = x.shape
        kernel = weight.shape[1]
        taps_KC, wide_bias = wide(weight.mT), wide(bias)
        y = x.new_empty(batch, columns - kernel + 1, channels)
        for piece in blocks(y.shape[1], batch * channels, taps_KC):
            total = torch.addcmul(wide_bias, _under_tap(x, piece, 0, same), taps_KC[0])
            for k in range(1, kernel):
                total.addcmul_(_under_tap(x, piece, k, same), taps_KC[k])
            y[:, piece] = total
        ctx.save_for_backward(x, weight, bias)
        ctx.same = same
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        kernel, same = weight.shape[1], ctx.same
        taps_KC = wide(weight.mT)
        grad_x, grad_taps_KC, grad_bias = torch.zeros_like(wide(x)), torch.zeros_like(taps_KC), wide(bias) * 0
        for piece in blocks(grad_y.shape[1], x.shape[0] * x.shape[2], taps_KC):
            grad = wide(grad_y[:, piece])
            grad_bias += grad.sum(dim=(0, 1))
            for k in range(kernel):
                # Where the input did not count, neither does the gradient.
                counted = grad if same is None else grad * same[:, piece, k, None]
                grad_x[:, piece.start + k : piece.stop + k].addcmul_(counted, taps_KC[k])
                grad_taps_KC[k] += (counted * _under_tap(x, piece, k, None)).sum(dim=(0, 1))
        return grad_x.to(x.dtype), grad_taps_KC.mT.to(weight.dtype), grad_bias.to(bias.dtype), None


def _under_tap(x_BWC: Tensor, piece: slice, k: int, same_BTK: Tensor | None) -> Tensor:
    """What the tokens of ``piece`` have under tap k."""
    inputs = wide(x_BWC[:, piece.start + k : piece.stop + k])
    return inputs if same_BTK is None else inputs * same_BTK[:, piece, k, None]


class CausalConv(nn.Module):
    """A depthwise causal convolution that knows rows of different lengths, and documents.

    Its state are the last K - 1 real inputs of each row, (B, K - 1, C).
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))  # the layout of nn.Conv1d
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def init_own_weights(self, config: MMaDAConfig) -> None:
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.kernel**-0.5  # as torch.nn.Conv1d: the inputs of one output are K numbers
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)

    def forward(self, x_BTC: Tensor, before_BKC: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """(B, T, C) to (B, T, C) and the new state; ``before_BKC`` is the state before, None for zeros."""
        batch, _, channels = x_BTC.shape
        if before_BKC is None:
            before_BKC = x_BTC.new_zeros(batch, self.kernel - 1, channels)
        x_BWC = torch.cat([before_BKC, x_BTC], dim=1)
        same_BTK = context.once(("same document", self.kernel), lambda: same_document(context, self.kernel))
        mixed_BTC = causal_conv(x_BWC, self.weight[:, 0], self.bias, same_BTK)
        return mixed_BTC, self._after(x_BWC, context)

    def _after(self, x_BWC: Tensor, context: Context) -> Tensor:
        if context.lengths_B is None:
            return x_BWC[:, x_BWC.shape[1] - self.kernel + 1 :].clone()  # a view would keep all inputs alive
        column_BK = context.lengths_B[:, None] + torch.arange(self.kernel - 1, device=x_BWC.device)
        return x_BWC.gather(1, column_BK[..., None].expand(-1, -1, x_BWC.shape[2]))


def same_document(context: Context, kernel: int) -> Tensor | None:
    """Whether what lies under tap k of token t is of the same document, (B, T, K); None where there is one per row."""
    documents_BT = context.documents_BT
    if documents_BT is None:
        return None
    documents_BW = torch.cat([documents_BT[:, :1].expand(-1, kernel - 1), documents_BT], dim=1)
    return documents_BW.unfold(1, kernel, 1) == documents_BT[..., None]
