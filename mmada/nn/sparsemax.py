"""Sparsemax: the projection onto the simplex, a softmax that gives exact zeros (arXiv:1602.02068)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, dim: int) -> Tensor:
        weights = (scores - threshold(scores, dim)).clamp(min=0)
        ctx.dim = dim
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        # eq. 11: the Jacobian is diag(s) - s sᵀ / |s|, with s marking the support.
        support = weights > 0
        inside = gradient.masked_fill(~support, 0)
        mean = inside.sum(ctx.dim, keepdim=True) / support.sum(ctx.dim, keepdim=True)
        return (inside - mean).masked_fill(~support, 0), None


def threshold(scores: Tensor, dim: int = -1) -> Tensor:
    """The τ that sparsemax takes off every score, ``dim`` kept with size 1 (algorithm 1, by sorting)."""
    sorted_scores = scores.sort(dim, descending=True).values
    rank = torch.arange(1, scores.shape[dim] + 1, device=scores.device, dtype=scores.dtype)
    rank = rank.view(-1, *[1] * (scores.dim() - 1 - dim % scores.dim()))
    sums = sorted_scores.cumsum(dim) - 1
    support_size = (rank * sorted_scores > sums).sum(dim, keepdim=True)
    support_size = support_size.clamp(min=1)  # 0 where a score is NaN, and so shall the weights be
    return sums.gather(dim, support_size - 1) / support_size


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """The point of the simplex nearest to ``scores`` along ``dim``: non-negative, sums to one, often exactly zero.

    A score of -inf gets the weight 0; along ``dim`` one at least must be finite. Half precision is computed in
    float32 and given back as it came. Differentiable once.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # A common shift changes nothing but the rounding of the sums.
    shifted = wide - wide.detach().amax(dim, keepdim=True)
    return _Sparsemax.apply(shifted, dim).to(scores.dtype)
