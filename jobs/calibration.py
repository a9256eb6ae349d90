"""How far a model's confidence on held-out predictions can be believed, before and after temperature scaling.

# N predictions, V vocabulary, B rows, T tokens
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from jobs.objectives.objective import LabelledRows, Objective, Place
from mmada.data import IGNORE_INDEX
from mmada.plots.reliability import reliability
from mmada.training.objectives.calibration import BinSums, calibration_error, hard_bins
from mmada.training.temperature import fit_temperature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cluster.engine import Engine

BINS_FILE = "logs/calibration.json"  # by source, what the figure is drawn from

MOST_LOGITS = 2**26  # kept by a worker for fitting: 256 MB in float32


@dataclass(frozen=True)
class Reliability:
    """Of held-out predictions: the temperature that every other row asks for, and the bins of the rows between them.

    ``raw`` and ``scaled``: before and after. Fitted and measured on different rows, so that nothing is flattered.
    """

    temperature: float
    raw: BinSums
    scaled: BinSums

    @property
    def error(self) -> float:
        """The expected calibration error before, in 15 equal bins."""
        return float(calibration_error(self.raw))

    @property
    def scaled_error(self) -> float:
        """And after."""
        return float(calibration_error(self.scaled))

    def metrics(self) -> dict[str, float]:
        """As a run reports them."""
        return {
            "held_out_calibration_error": self.error,
            "scaled_calibration_error": self.scaled_error,
            "temperature": self.temperature,
        }

    def bins(self) -> dict[str, dict[str, list[float]]]:
        """As ``mmada.plots.reliability`` draws them."""
        named = {"as trained": self.raw, f"at temperature {self.temperature:.2f}": self.scaled}
        return {
            name: dict(zip(("count", "confidence", "correct"), own.stacked().tolist(), strict=True))
            for name, own in named.items()
        }


@torch.no_grad()
def held_out_calibration(
    forward: Callable[..., Any], rows: LabelledRows, *, batch_rows: int, place: Place
) -> Reliability:
    """Predict the labels of rows; workers take turns and find the same.

    Rows count as far as logits for MOST_LOGITS fit a worker. Every worker makes the same calls of ``forward``. Raises
    ValueError for fewer than two rows.
    """
    num_rows = len(rows)
    if num_rows < 2:
        raise ValueError(f"{num_rows} held-out rows cannot be divided for fitting and measuring; hold out two or more")
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    room, per_pass = MOST_LOGITS, batch_rows * place.world
    for first in range(0, num_rows, per_pass):
        wanted = np.arange(first + place.rank * batch_rows, first + (place.rank + 1) * batch_rows)
        part, size = _predictions(forward, rows, wanted, num_rows, place)
        parts.append(part)
        room -= size  # of the whole pass, which is as large on every worker
        if room < size:
            break
    logits_NV, target_N, is_fit_N = (torch.cat(each) for each in zip(*parts, strict=True))
    fit_NV, fit_target_N = logits_NV[is_fit_N], target_N[is_fit_N]

    def loss(temperature: float) -> float:
        scaled_NV = fit_NV.double() / temperature
        nats = torch.nn.functional.cross_entropy(scaled_NV, fit_target_N, reduction="sum")
        return float(place.sum(nats.clone()))

    temperature = fit_temperature(loss)
    measured = logits_NV[~is_fit_N], target_N[~is_fit_N]
    return Reliability(temperature, _bins(*measured, 1.0, place), _bins(*measured, temperature, place))


def _predictions(
    forward: Callable[..., Any], rows: LabelledRows, wanted: np.ndarray, num_rows: int, place: Place
) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Logits (N, V) float32, targets (N,), which of them are for fitting (N,); and how many logits the pass had.

    Rows past the last count for nothing.
    """
    batch = rows.batch(np.minimum(wanted, num_rows - 1))
    labels_BT = batch.pop("shift_labels").to(place.device)
    labels_BT[torch.from_numpy(wanted >= num_rows).to(place.device)] = IGNORE_INDEX
    logits_BTV = forward(**{name: value.to(place.device) for name, value in batch.items()}, use_cache=False).logits
    counts_BT = labels_BT != IGNORE_INDEX
    is_fit_BT = torch.from_numpy(wanted % 2 == 0).to(place.device)[:, None].expand_as(labels_BT)
    return (logits_BTV[counts_BT].float(), labels_BT[counts_BT], is_fit_BT[counts_BT]), logits_BTV.numel()


def _bins(logits_NV: Tensor, target_N: Tensor, temperature: float, place: Place) -> BinSums:
    confidence_N, answer_N = (logits_NV.double() / temperature).softmax(dim=-1).max(dim=-1)
    bins = hard_bins(confidence_N, (answer_N == target_N).double())
    return BinSums(*place.sum(bins.stacked()))


def report_calibration(
    objective: Objective, engine: Engine, place: Place, *, batch_rows: int, run_dir: Path
) -> dict[str, float]:
    """Metrics for every source that is held out, and its bins on disk. The model is in evaluation mode.

    A source of which a single row is held out has none: a run that has learned does not fail for it.
    """
    metrics: dict[str, float] = {}
    bins = {}
    for name, rows in objective.held_out().items():
        if len(rows) < 2:
            continue
        found = held_out_calibration(engine.forward, rows, batch_rows=batch_rows, place=place)
        metrics |= {f"{key}.{name}" if name else key: value for key, value in found.metrics().items()}
        bins[name] = found.bins()
    if place.rank == 0:
        (run_dir / BINS_FILE).write_text(json.dumps(bins))
    return metrics


def reliability_figures(run_dir: Path, title: str) -> dict[str, Figure]:
    """What ``report_calibration`` left on disk as figures, by name; none where it was not asked for."""
    file = run_dir / BINS_FILE
    bins = json.loads(file.read_text()) if file.exists() else {}
    return {
        f"reliability-{source}" if source else "reliability": reliability(own, f"{title}  {source}".rstrip())
        for source, own in bins.items()
    }
