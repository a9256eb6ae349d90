"""Numbers that layers hand out about themselves when somebody asks, and that cost nothing otherwise.

A layer calls ``observe(self, gate=g_BTD)`` in its forward. Nothing happens unless a collector is open:

    with collect_statistics(model) as statistics:
        model(input_ids)
    statistics.summary()["layers.0.mixer"]["gate_mean"]

    with record(model, "surprise") as surprise:
        model(input_ids)
    surprise["layers.0.mixer.memory"]  # (B, T, heads)

Of statistics only running sums are kept, so a whole evaluation set may pass by. A layer whose numbers mean more than
their mean and spread has a method ``summarise(moments: dict[str, Moments]) -> dict[str, float]``, which is used in
place of the usual summary.

# B batch, T tokens, C whatever the last dimension is: channels, heads, slots
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

Collector = TypeVar("Collector", "Statistics", "Record", "Live")

# One per thread and task, so that two of them can look at different models at once.
_open: ContextVar[tuple[Statistics | Record | Live, ...]] = ContextVar("open_collectors", default=())


def is_anyone_looking() -> bool:
    """Whether ``observe`` has anybody to hand numbers to; for those that must be computed on the way."""
    return bool(_open.get())


def observe(module: nn.Module, where: Tensor | None = None, **values: Tensor | Callable[[], Tensor]) -> None:
    """Hand the open collectors tensors (..., C) of ``module``, by name; the last dimension is kept apart.

    ``where``: boolean, of the leading dimensions: which entries count (``context.valid_BT()``); None for all.
    A value that takes work to compute may be given as a function, which is called only if somebody looks.
    What gradient checkpointing computes anew in the backward pass is not counted again.
    """
    if torch._C._current_graph_task_id() != -1:  # inside a backward pass; how torch's own checkpointing tells
        return
    for collector in _open.get():
        collector.add(module, where, values)


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[Statistics]:
    """Collect what the modules of ``model`` observe in this thread until the block ends."""
    with _opened(Statistics(model)) as statistics:
        yield statistics


@contextmanager
def record(model: nn.Module, name: str) -> Iterator[Record]:
    """Keep the values that the modules of ``model`` observe under ``name``, token by token, until the block ends."""
    with _opened(Record(model, name)) as values:
        yield values


@contextmanager
def live(model: nn.Module, name: str) -> Iterator[Live]:
    """Gather sums of what the modules of ``model`` observe under ``name``, with their gradients."""
    with _opened(Live(model, name)) as values:
        yield values


@contextmanager
def _opened(collector: Collector) -> Iterator[Collector]:
    token = _open.set((*_open.get(), collector))
    try:
        yield collector
    finally:
        _open.reset(token)


class Moments:
    """Count, mean, spread and extremes over everything but the last dimension, in float32 at least."""

    def __init__(self) -> None:
        self.count = 0
        self._shift_C: Tensor | None = None  # sums are taken around the first mean, against cancellation
        self._sum_C: Tensor
        self._squares_C: Tensor
        self.min_C: Tensor
        self.max_C: Tensor

    def add(self, values: Tensor) -> None:
        """Count (..., C) in."""
        flat_NC = values.reshape(-1, values.shape[-1])
        flat_NC = flat_NC.to(torch.promote_types(flat_NC.dtype, torch.float32))
        if flat_NC.shape[0] == 0:
            return
        least_C, most_C = flat_NC.amin(dim=0), flat_NC.amax(dim=0)
        if self._shift_C is None:
            self._shift_C = flat_NC.mean(dim=0)
            self._sum_C, self._squares_C = torch.zeros_like(least_C), torch.zeros_like(least_C)
            self.min_C, self.max_C = least_C, most_C
        flat_NC = flat_NC - self._shift_C
        self.count += flat_NC.shape[0]
        self._sum_C = self._sum_C + flat_NC.sum(dim=0)
        self._squares_C = self._squares_C + flat_NC.square().sum(dim=0)
        self.min_C, self.max_C = torch.minimum(self.min_C, least_C), torch.maximum(self.max_C, most_C)

    @property
    def mean_C(self) -> Tensor:
        """Mean of each entry of the last dimension."""
        return self._shift_C + self._sum_C / self.count

    @property
    def mean(self) -> float:
        """Mean over everything."""
        return float(self.mean_C.mean())

    @property
    def std(self) -> float:
        """Standard deviation over everything (of the numbers themselves: divided by their count)."""
        within_C = self._squares_C / self.count - (self._sum_C / self.count).square()
        return float((within_C.mean() + self.mean_C.var(correction=0)).clamp(min=0).sqrt())

    def summary(self, name: str) -> dict[str, float]:
        """``{name}_mean``, ``_std``, ``_min`` and ``_max`` over everything."""
        return {
            f"{name}_mean": self.mean,
            f"{name}_std": self.std,
            f"{name}_min": float(self.min_C.min()),
            f"{name}_max": float(self.max_C.max()),
        }


class Statistics:
    """What the modules of one model have observed."""

    def __init__(self, model: nn.Module) -> None:
        self._named = {module: name for name, module in model.named_modules()}
        self._moments: dict[nn.Module, dict[str, Moments]] = {}

    @torch.no_grad()
    def add(self, module: nn.Module, where: Tensor | None, values: dict[str, Tensor | Callable[[], Tensor]]) -> None:
        """Count in what ``observe`` was given, if the module is one of this model's."""
        if module not in self._named:
            return
        moments = self._moments.setdefault(module, {})
        for name, value in values.items():
            tensor = (value if isinstance(value, Tensor) else value()).detach()
            moments.setdefault(name, Moments()).add(tensor if where is None else tensor[where])

    def summary(self) -> dict[str, dict[str, float]]:
        """Numbers by the module's name in the model; modules that observed nothing are left out."""
        summaries = {}
        for module, moments in self._moments.items():
            seen = {name: each for name, each in moments.items() if each.count}
            if seen:
                summaries[self._named[module]] = summarise(module, seen)
        return summaries


class Record:
    """Observed values of one name, as they were: a profile along a text, say.

    ``calls``: by the module's name, what each forward pass observed, (B, T, C), detached; NaN where nothing counts,
    which is at padding. Rows are as mixers see them: padding stands behind.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._named = {module: own_name for own_name, module in model.named_modules()}
        self._name = name
        self.calls: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, module: nn.Module, where: Tensor | None, values: dict[str, Tensor | Callable[[], Tensor]]) -> None:
        """Keep what ``observe`` was given, if it is what this is a record of."""
        if module not in self._named or self._name not in values:
            return
        value = values[self._name]
        tensor = (value if isinstance(value, Tensor) else value()).detach()
        if where is not None:
            tensor = tensor.masked_fill(~where[..., None], torch.nan)
        self.calls.setdefault(self._named[module], []).append(tensor)

    def __getitem__(self, module_name: str) -> Tensor:
        """All that a module observed, (B, T, C), the tokens of later passes behind those of earlier ones."""
        return torch.cat(self.calls[module_name], dim=1)


class Live:
    """Sums of observed values of one name over all tokens that count, for losses that are made of their means.

    ``sums``: by the module's name, a scalar with its gradient; ``counts``: how many values are in it, 0 of a module
    that no token reached.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self._named = {module: own_name for own_name, module in model.named_modules()}
        self._name = name
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, module: nn.Module, where: Tensor | None, values: dict[str, Tensor | Callable[[], Tensor]]) -> None:
        """Take what ``observe`` was given, if it is what this gathers."""
        if module not in self._named or self._name not in values:
            return
        value = values[self._name]
        tensor = value if isinstance(value, Tensor) else value()
        counted = tensor if where is None else tensor[where]
        own_name = self._named[module]
        self.sums[own_name], self.counts[own_name] = counted.sum(), counted.numel()


def summarise(module: nn.Module, moments: dict[str, Moments]) -> dict[str, float]:
    """The module's own summary where it has one, else mean, spread and extremes."""
    own = getattr(module, "summarise", None)
    if own is not None:
        return own(moments)
    return {key: value for name, each in moments.items() for key, value in each.summary(name).items()}
