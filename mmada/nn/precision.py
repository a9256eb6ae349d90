"""float32 at least, for what loses too much in narrower numbers: decays, steps, norms, states."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor

# e^-40 is nothing beside 1, in float64, too. What is much smaller makes products of two denormal in float32, and a
# processor takes ten times as long over those.
SMALLEST_LOG_DECAY = -40.0


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def widened(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """``scan`` with its inputs in float32, or in the widest dtype among them if that is wider, and autocast off."""

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
