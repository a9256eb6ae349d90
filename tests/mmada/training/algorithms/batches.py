"""Batches that the tests of algorithms share."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from mmada.training.algorithms import PolicyBatch

LENGTHS = [5, 1, 7, 3, 6, 2]


def policy_batch(seed: int = 0, lengths: list[int] = LENGTHS, behind: float = 3.0) -> PolicyBatch:
    """Everything a loss may ask for, float64, with gradients where they belong; ``behind`` stands behind the rows."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def draw(scale: float = 1.0, shift: float = 0.0) -> Tensor:
        drawn_BT = scale * torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64) + shift
        return drawn_BT.masked_fill(~mask_BT, behind)

    logprobs_BT = draw(0.4, -1.5)
    advantages_BT = (draw()[:, :1] * mask_BT).double()
    return PolicyBatch(
        logprobs_BT=logprobs_BT.clone().requires_grad_(),
        old_logprobs_BT=(logprobs_BT + draw(0.2)).masked_fill(~mask_BT, -behind),
        advantages_BT=advantages_BT,
        mask_BT=mask_BT,
        reference_logprobs_BT=draw(0.4, -1.5),
        returns_BT=draw(),
        values_BT=draw().requires_grad_(),
        old_values_BT=draw(),
        entropy_BT=draw(0.1, 1.0).requires_grad_(),
    )


def rows(batch: PolicyBatch, chosen: list[int]) -> PolicyBatch:
    """Some rows of a batch, through which gradients reach the whole one."""
    return replace(batch, **{each.name: getattr(batch, each.name)[chosen] for each in fields(batch)})


def gradients(batch: PolicyBatch, total: Tensor) -> dict[str, Tensor]:
    """The gradient of a scalar by each tensor of the batch that can have one; 0 where it does not depend on it."""
    names = [each.name for each in fields(batch) if getattr(getattr(batch, each.name), "requires_grad", False)]
    found = torch.autograd.grad(total, [getattr(batch, name) for name in names], allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(getattr(batch, name)) if each is None else each
        for name, each in zip(names, found, strict=True)
    }
