"""Which attempt of a trial goes on, or begins, after a pause, a takeover and a crash."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.trial_actor import Channel
from jobs.tuning.book import TrialEntry
from jobs.tuning.trial import LOCK, _Trial

RATE = {"train.learning_rate": 1e-3}


class Starts:
    """One trial, started again and again in the same sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trial_dir = folder / "trials" / "trial-0002"

    def start(self, drawn: dict[str, float], restored: dict[str, Any] | None = None) -> _Trial:
        channel = Channel("tune-id")
        channel.restored = restored
        config = {
            "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-1]}},
            "sweep": str(self.folder),
            "metric": "bits_per_byte",
            "carries": 2,
        }
        return _Trial(TrialEntry(2, "tune-id", RATE), "identity", drawn, config, channel)

    def checkpoint(self, place: Path, step: int) -> Path:
        made = place / f"step-{step:08d}"
        made.mkdir(parents=True)
        (made / "weights").write_text(f"{place} {step}")
        return made

    def begun(self, attempt: int) -> None:
        (self.trial_dir / f"attempt-{attempt}" / "recipe.yaml").touch()


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


def test_what_was_not_begun_begins_and_what_was_goes_on(starts: Starts) -> None:
    assert starts.start(RATE)._attempt() == (1, True)
    assert starts.start(RATE)._attempt() == (1, True)  # its process died before the run had begun
    starts.begun(1)
    assert starts.start(RATE)._attempt() == (1, False)
    own = {"trial": 2, "step": 4, "checkpoint": "its own"}
    assert starts.start(RATE, own)._attempt() == (1, False)  # after a pause


@pytest.mark.parametrize("drawn", [RATE, {"train.learning_rate": 2e-3}], ids=["its own settings", "others"])
def test_a_takeover_begins_an_attempt_from_the_donors_checkpoint(starts: Starts, drawn: dict[str, float]) -> None:
    starts.start(RATE)._attempt()
    starts.begun(1)
    donor = starts.checkpoint(starts.folder / "donor", 8)
    restored = {"trial": 1, "step": 8, "checkpoint": str(donor)}
    assert starts.start(drawn, restored)._attempt() == (2, True)
    copied = starts.trial_dir / "attempt-2" / "checkpoints" / donor.name / "weights"
    assert copied.read_text() == (donor / "weights").read_text()
    starts.begun(2)
    assert starts.start(drawn, restored)._attempt() == (2, False)  # a crash before its first report
    own = {"trial": 2, "step": 12, "checkpoint": "its own"}
    assert starts.start(drawn, own)._attempt() == (2, False)
    other = {"trial": 3, "step": 16, "checkpoint": str(starts.checkpoint(starts.folder / "other", 16))}
    assert starts.start(drawn, other)._attempt() == (3, True)


def test_checkpoints_are_carried_by_attempt_and_the_newest_are_kept(starts: Starts) -> None:
    trial = starts.start(RATE)
    trial.attempt = 1
    run = starts.folder / "run"
    for step in (2, 4, 12):
        trial._carry(starts.checkpoint(run, step))
    assert [each.name for each in trial._carried()] == ["step-00000004", "step-00000012"]

    donors = {"trial": 1, "step": 10, "checkpoint": "the donor's"}
    taker = starts.start(RATE, donors)
    taker.attempt = 2
    taker._begin_to_carry()
    assert taker.channel.pointer == donors
    again = starts.checkpoint(starts.folder / "second", 12)
    taker._carry(again)
    kept = taker._carried()[-1]
    assert (kept.parent.name, kept.name) == ("2", "step-00000012")
    assert (kept / "weights").read_text() == (again / "weights").read_text()  # not that of the first attempt
    assert taker.channel.pointer == {"trial": 2, "step": 12, "checkpoint": str(kept)}

    paused = starts.start(RATE, {"trial": 2, "step": 2, "checkpoint": "an older one"})
    paused.attempt = 2
    paused._begin_to_carry()
    assert paused.channel.pointer["checkpoint"] == str(kept)


def test_where_a_newer_checkpoint_has_replaced_it_the_newest_is_carried(starts: Starts) -> None:
    """Otherwise who goes on from this trial would begin anew; from the last step there would be nothing to go on to."""
    trial = starts.start(RATE)
    trial.attempt, trial._steps = 1, 16
    run = starts.folder / "run"
    _, newest, _ = (starts.checkpoint(run, step) for step in (8, 12, 16))
    trial._carry(run / "step-00000004")
    (kept,) = trial._carried()
    assert trial.channel.pointer == {"trial": 2, "step": 12, "checkpoint": str(kept)}
    assert (kept / "weights").read_text() == (newest / "weights").read_text()
    trial._carry(starts.folder / "gone" / "step-00000008")
    assert trial._carried() == [kept] and trial.channel.pointer["step"] == 12


def test_a_trial_waits_for_its_process_before_a_pause(starts: Starts) -> None:
    trial = starts.start(RATE)
    with open(starts.trial_dir / LOCK, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(1.0, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        with trial.alone():
            assert time.monotonic() - began >= 0.9
