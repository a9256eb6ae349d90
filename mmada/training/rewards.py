"""What a completion is worth, or why nobody can say: one result per sample, checked before anyone learns from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmada.data.tasks import TaskItem


@dataclass(frozen=True)
class RewardSample:
    """A completion to be scored. ``is_ended``: it made its end token itself, rather than being cut."""

    item: TaskItem
    completion: str
    is_ended: bool = True

    @property
    def prompt(self) -> str:
        """The prompt that the completion continues."""
        return self.item.prompt

    @property
    def columns(self) -> dict[str, Any]:
        """What a reward may want to know beside prompt and completion, by name."""
        item = self.item
        values = (item.answer, item.family, item.entry, item.index, self.is_ended)
        return dict(zip(COLUMNS, values, strict=True))


LARGEST = 1e9  # of a reward's magnitude: its square, and the sum of many, must stay far within float32
COLUMNS = ("answer", "family", "entry", "index", "is_ended")


@dataclass(frozen=True)
class RewardResult:
    """``value``, or ``error`` which says in one line why there is none: exactly one of them is not None.

    ``components``: what the value is made of, for reports. ``seconds``: this sample's share of the time that scoring
    took.
    """

    value: float | None
    error: str | None = None
    components: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.value is None) == (self.error is None):
            raise ValueError(f"value={self.value} and error={self.error!r}: exactly one of them is given")


class RewardCallError(ValueError):
    """A call as a whole went wrong: no answer, or not one number per sample, so nobody can say which is whose."""


def failed(name: str, error: BaseException) -> RewardResult:
    """The result of a sample whose scoring raised."""
    lines = str(error).strip().splitlines()
    return RewardResult(None, f"{name}: {type(error).__name__}{': ' + lines[0] if lines else ''}")


def check_values(values: Any, count: int, name: str) -> list[RewardResult]:
    """What a reward gave for ``count`` samples, one result each.

    ``values``: a list, a tuple, or an array or tensor of one dimension. A number is a result; NaN, an infinity, None, a
    truth value, a string and whatever else is no number is an error of its sample alone.

    Raises:
        RewardCallError: no list, or one of another length. A single number is never taken for all samples.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, list | tuple):
        raise RewardCallError(
            f"{name} gave {_described(values)} for {count} samples; it must give a list with a number for each"
        )
    if len(listed) != count:
        raise RewardCallError(f"{name} gave {len(listed)} numbers for {count} samples; it must give one for each")
    return [_checked(value, name) for value in listed]


def _checked(value: Any, name: str) -> RewardResult:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return RewardResult(None, f"{name} gave {_described(value)}; a reward is a number")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float
        number = math.inf
    if not math.isfinite(number):
        return RewardResult(None, f"{name} gave {number}; a reward is a finite number")
    if abs(number) > LARGEST:
        return RewardResult(None, f"{name} gave {number:g}; a reward is at most {LARGEST:g} in magnitude")
    return RewardResult(number)


def _described(value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return shown if value is None else f"{type(value).__name__} {' '.join(shown.split())}"


Scoring = Callable[[Sequence[RewardSample]], list[RewardResult]]


def score_singly_where_raising(samples: Sequence[RewardSample], score: Scoring, name: str) -> list[RewardResult]:
    """``score(samples)``; where that raises, each sample by itself, so that only those that raise alone fail.

    A RewardCallError is no sample's fault: it fails them all, without another call. No samples take no call.
    """
    if not samples:
        return []
    began = time.perf_counter()
    try:
        results = score(samples)
    except RewardCallError as error:
        results = [RewardResult(None, str(error))] * len(samples)
    except Exception as error:  # whatever a user's code raises is the samples' failure, told in their results
        if len(samples) > 1:
            return [result for each in samples for result in score_singly_where_raising([each], score, name)]
        results = [failed(name, error)] * len(samples)
    seconds = (time.perf_counter() - began) / len(samples)
    return [replace(result, seconds=seconds) for result in results]
