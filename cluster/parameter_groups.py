"""Which parameters the optimizer decays, which learn faster or slower than others, and which may have to wait."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

FACTOR = "learning_rate_factor"  # of a group, on the learning rate of a step
FROZEN = "frozen"  # of a group: whether the optimizer passes it over
SPLITS = "splits"  # of a group: numbers of the patterns that its parameters' names match


class WaitingAdamW(torch.optim.AdamW):
    """AdamW that passes over groups which are frozen: weights, moments and step counts stay as they are."""

    def step(self, closure: Any = None) -> Any:
        """As AdamW's, of the other groups."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(FROZEN, False)]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


def matches(pattern: str, name: str) -> bool:
    """Whether a parameter's name holds the regular expression."""
    return re.search(pattern, name) is not None


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Sequence[tuple[str, float]] = (), splits: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not, as everywhere since GPT-2.

    Nor does a parameter that carries ``_no_weight_decay``, as the decay rates of state spaces do (Mamba's convention).
    Parameters without gradient are left out. ``factors``: pairs of a regular expression and the factor of those whose
    names it is found in; the first that is found counts, 1 where none is. ``splits``: regular expressions; parameters
    that differ in which of them they match are in different groups, so that each can be frozen alone.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.dim() >= 2 and not getattr(parameter, "_no_weight_decay", False)
        factor = next((factor for pattern, factor in factors if matches(pattern, name)), 1.0)
        matched = [number for number, pattern in enumerate(splits) if matches(pattern, name)]
        kind = "matrices" if decays else "vectors"
        kind += f" at {factor:g}" if factor != 1 else ""
        kind += f" of {matched}" if matched else ""
        group = groups.setdefault(
            (not decays, factor, *matched),
            {
                "name": kind,
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                FACTOR: factor,
                SPLITS: matched,
                FROZEN: False,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
