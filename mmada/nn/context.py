"""What every sequence mixer is told about the tokens it gets, beside the tokens themselves.

Mixers see rows in *front layout*: the real tokens of a row stand at its front, whatever padding there is behind
them. ``MMaDAModel`` brings any padding into this layout and its outputs back. A mixer may therefore count columns:
column t of a row is the row's token number ``past + t``, and it must only leave its state as of the last real one.

# B batch, T tokens of this forward pass
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Context:
    """One forward pass, as all layers see it.

    ``shape``: (B, T) of the tokens. ``device``: where they are.
    ``lengths_B``: real tokens in each row, int64; None: all T.
    ``past``: tokens that the rows had before; ``past_B`` where the rows differ in that, and ``past`` is the largest.
    ``least_past``: then the smallest, where somebody knows it.
    ``position_ids_BT``: positions as the caller means them, for rotary angles.
    ``documents_BT``: number of the document that a token belongs to, where rows hold several; they do not see
        each other. None: one document per row. Only without a filled cache.
    ``rotary``: cos and sin of the positions, each (B, T, K); None where positions are not rotary.
    """

    shape: tuple[int, int]
    device: torch.device
    position_ids_BT: Tensor
    lengths_B: Tensor | None = None
    past: int = 0
    past_B: Tensor | None = None
    least_past: int | None = None
    documents_BT: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in what they had, or in what they have now."""
        return self.lengths_B is not None or self.past_B is not None

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once for all layers of this forward pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Context:
        """The same on another device. Hooks that lay the blocks out over several call it (``device_map``)."""
        device = torch.device(device)
        return self if device == self.device else self.once(("to", device), lambda: self._moved(device, non_blocking))

    def _moved(self, device: torch.device, non_blocking: bool) -> Context:
        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(each) for each in value)
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        values = {each.name: moved(getattr(self, each.name)) for each in fields(self)}
        return replace(self, **{**values, "device": device, "_made": {}})

    def index_BT(self) -> Tensor:
        """Number of every token in its row, counted from the row's first; (B, T), or (1, T) where all rows agree."""
        column = torch.arange(self.shape[1], device=self.device)[None]
        return column + (self.past if self.past_B is None else self.past_B[:, None])

    def valid_BT(self) -> Tensor | None:
        """True for real tokens; None where all are."""
        if self.lengths_B is None:
            return None
        return torch.arange(self.shape[1], device=self.device)[None] < self.lengths_B[:, None]

    def totals_B(self) -> Tensor:
        """Real tokens in each row, those of this forward pass included."""
        batch, length = self.shape
        past = torch.full((batch,), self.past, device=self.device) if self.past_B is None else self.past_B
        return past + (length if self.lengths_B is None else self.lengths_B)

    def total_range(self) -> tuple[int, int]:
        """The smallest and the largest of ``totals_B``."""
        if not self.is_ragged:
            return (self.past + self.shape[1],) * 2
        if self.lengths_B is None and self.least_past is not None:
            return self.least_past + self.shape[1], self.past + self.shape[1]
        # On an accelerator reading a number waits for the device: once per pass, not once per layer.
        return self.once("total_range", lambda: tuple(torch.stack(self.totals_B().aminmax()).tolist()))


def front_order(valid_BT: Tensor) -> Tensor | None:
    """The columns of each row with the real tokens first, (B, T); None where they are first already."""
    if bool((valid_BT[:, :-1] >= valid_BT[:, 1:]).all()):
        return None
    return torch.argsort((~valid_BT).to(torch.uint8), dim=1, stable=True)


def take_columns(states: Tensor, order_BT: Tensor, dim: int = 1) -> Tensor:
    """``states`` with the columns of each row in the given order; batch first, columns in ``dim``."""
    index = order_BT.view(order_BT.shape[0], *[1] * (dim - 1), order_BT.shape[1], *[1] * (states.dim() - dim - 1))
    shape = list(states.shape)
    shape[dim] = order_BT.shape[1]
    return states.gather(dim, index.to(states.device).expand(shape))
