"""Held-out calibration: beside a plain count over the same predictions, alike on two workers, and in a run's figure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from jobs import calibration
from jobs.calibration import (
    BINS_FILE,
    Reliability,
    held_out_calibration,
    reliability_figures,
    report_calibration,
)
from jobs.objectives.objective import Place
from mmada.data import IGNORE_INDEX
from mmada.training.temperature import fit_temperature
from tests.jobs.workers import run_all, small_recipe

VOCABULARY, LENGTH = 11, 6


class KnownRows:
    """Rows whose ids name what a model shall say of them."""

    num_targets = 0

    def __init__(self, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.randint(0, VOCABULARY, (num_rows, LENGTH), generator=generator)
        self.logits = 3 * torch.randn(num_rows, LENGTH, VOCABULARY, generator=generator)
        self.logits.scatter_add_(2, self.labels[..., None], torch.full((num_rows, LENGTH, 1), 2.0))
        self.labels[::3, :2] = IGNORE_INDEX

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        rows = torch.from_numpy(indices)
        return {"input_ids": rows[:, None].expand(-1, LENGTH), "shift_labels": self.labels[rows]}

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids[:, 0]])


def alone() -> Place:
    return Place(0, 1, torch.device("cpu"), lambda value: value)


def plainly(logits_NV: Tensor, target_N: Tensor, temperature: float) -> float:
    """The error in 15 bins, prediction by prediction."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for logits_V, target in zip(logits_NV.double() / temperature, target_N.tolist(), strict=True):
        confidence, answer = logits_V.softmax(0).max(0)
        bins.setdefault(min(14, int(confidence * 15)), []).append((float(confidence), int(answer) == target))
    return sum(abs(sum(right - sure for sure, right in own)) for own in bins.values()) / len(target_N)


def found_in(rows: KnownRows, num_rows: int) -> tuple[Reliability, float, float, float]:
    """What is found, and what should be: temperature, error, error at the temperature."""
    found = held_out_calibration(rows.forward, rows, batch_rows=4, place=alone())
    own = [torch.arange(num_rows) % 2 == parity for parity in (0, 1)]
    (fit_NV, fit_N), (measured_NV, measured_N) = (
        (rows.logits[:num_rows][which][counts], rows.labels[:num_rows][which][counts])
        for which in own
        for counts in [rows.labels[:num_rows][which] != IGNORE_INDEX]
    )
    temperature = fit_temperature(lambda t: float(cross_entropy(fit_NV.double() / t, fit_N, reduction="sum")))
    return found, temperature, plainly(measured_NV, measured_N, 1.0), plainly(measured_NV, measured_N, temperature)


def test_every_other_row_is_fitted_and_the_others_are_measured():
    found, temperature, error, scaled = found_in(KnownRows(21), 21)
    assert found.temperature == pytest.approx(temperature, rel=1e-4) and temperature > 1.2  # they are too sure
    assert (found.error, found.scaled_error) == pytest.approx((error, scaled), rel=1e-4)
    assert found.scaled_error < found.error


def test_no_more_logits_are_kept_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(calibration, "MOST_LOGITS", 2 * 4 * LENGTH * VOCABULARY + 1)
    found, temperature, error, _ = found_in(KnownRows(21), 8)  # two passes of four rows
    assert (found.temperature, found.error) == pytest.approx((temperature, error), rel=1e-4)


def test_one_row_cannot_be_divided():
    rows = KnownRows(1)
    with pytest.raises(ValueError, match="1 held-out rows cannot be divided"):
        held_out_calibration(rows.forward, rows, batch_rows=4, place=alone())


def test_a_source_of_one_row_is_left_out_and_ends_no_run(tmp_path: Path):
    many, one = KnownRows(21), KnownRows(1)
    objective = SimpleNamespace(held_out=lambda: {"text": many, "sums": one})
    (tmp_path / "logs").mkdir()
    engine = SimpleNamespace(forward=many.forward)
    found = report_calibration(objective, engine, alone(), batch_rows=4, run_dir=tmp_path)  # type: ignore[arg-type]
    assert found.keys() == {
        f"{name}.text" for name in ("held_out_calibration_error", "scaled_calibration_error", "temperature")
    }
    assert [*reliability_figures(tmp_path, "run")] == ["reliability-text"]


def test_a_run_reports_it_alike_on_one_worker_and_on_two(tmp_path: Path, prepared: Path):
    found = []
    for workers in (1, 2):
        run_dir = tmp_path / str(workers) / "run"
        keys = {"train.steps": 2, "train.warmup_steps": 1, "train.zero_stage": 1}
        keys |= {"cluster.workers": workers, "cluster.expert_parallel": 1}
        recipe = small_recipe(run_dir.parent, **keys, **{"objectives.weights": "{calibration: 0}"})
        ((rows, _, _),) = run_all([(recipe, run_dir, 99)], prepared)
        bins = json.loads((run_dir / BINS_FILE).read_text())[""]
        found.append((rows[-1], bins))
    (one, one_bins), (two, two_bins) = found
    assert "held_out_calibration_error" in one and one.keys() == two.keys()
    assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-4)
    assert two["held_out_calibration_error"] == pytest.approx(one["held_out_calibration_error"], abs=1e-3)
    counts = [sum(own["count"]) for bins in (one_bins, two_bins) for own in bins.values()]
    assert len(counts) == 4 and len(set(counts)) == 1  # no prediction is lost or counted twice
    (figure,) = reliability_figures(run_dir, "run").values()
    assert [line.get_label() for line in figure.axes[0].lines[1:]] == [*two_bins]
