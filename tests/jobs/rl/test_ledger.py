"""The ledger tells what was done twice, and what was never done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.rl.ledger import DRIVER_FILE, LEARNER_FILE, LedgerFile, copy_for_checkpoint, entries, ledger_totals, restore


class Run:
    """Writes what a driver and a learner write: two prompts, one sample each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver, self.learner = LedgerFile(folder / DRIVER_FILE), LedgerFile(folder / LEARNER_FILE)

    def close(self) -> None:
        self.driver.close()
        self.learner.close()

    def begin(self, generation: int, start: int) -> None:
        self.driver.write("begin", generation=generation, start=start)
        self.learner.write("begin", start=start)

    def make(self, generation: int, iteration: int, dropped: int = 0) -> None:
        named = {"iteration": iteration, "generation": generation}
        self.driver.write("drawn", **named, prompts=[2 * iteration, 2 * iteration + 1], samples=1)
        for slot in range(2):
            self.driver.write("sampled", **named, slot=slot, versions=[iteration])
        for slot in range(dropped):
            self.driver.write("dropped", **named, slot=slot, sample=0, reason="the reward was NaN")

    def train(self, generation: int, iteration: int, slots: tuple[int, ...] = (0, 1)) -> None:
        named = {"iteration": iteration, "generation": generation}
        self.learner.write("trained", **named, trajectories=[[slot, 0] for slot in slots])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    made.begin(1, 0)
    for iteration in range(3):
        made.make(1, iteration)
    yield made
    made.close()


def test_a_whole_run_has_lost_nothing_and_done_nothing_twice(run: Run):
    run.make(1, 3, dropped=1)
    for iteration in range(3):
        run.train(1, iteration)
    run.train(1, 3, slots=(1,))
    found = entries(run.folder)
    assert [entry.iteration for entry in found] == [0, 1, 2, 3]
    totals = {"trained": 7, "dropped": 1, "lost": 0, "doubled": 0, "skipped_iterations": 0}
    assert ledger_totals(found) == totals
    assert not any(entry.lost or entry.doubled for entry in found)
    assert found[3].dropped == {(0, 0): "the reward was NaN"} and found[2].prompts == [4, 5]


def test_what_is_neither_trained_nor_dropped_is_lost(run: Run):
    run.train(1, 0, slots=(1,))
    (entry,) = entries(run.folder)
    assert entry.lost == [(0, 0)] and entry.doubled == []
    assert ledger_totals([entry])["lost"] == 1


def test_an_iteration_that_is_learned_twice_shows(run: Run):
    run.train(1, 0)
    run.train(1, 0)
    run.train(1, 2)
    found = entries(run.folder)
    assert found[0].doubled == [(0, 0), (1, 0)]
    totals = ledger_totals(found)
    assert (totals["doubled"], totals["skipped_iterations"]) == (2, 1)


def test_what_is_trained_and_dropped_shows(run: Run):
    run.make(1, 1, dropped=1)
    run.train(1, 1)
    assert entries(run.folder)[0].doubled == [(0, 0)]


def test_beginning_again_replaces_what_was_done_after_the_checkpoint(run: Run):
    for iteration in range(3):
        run.train(1, iteration)
    run.begin(2, 1)
    for iteration in (1, 2):
        run.make(2, iteration)
        run.train(2, iteration)
    found = entries(run.folder)
    assert [(entry.iteration, entry.generation) for entry in found] == [(0, 1), (1, 2), (2, 2)]
    assert not any(entry.lost or entry.doubled for entry in found)


def test_a_checkpoints_copy_fills_in_what_a_folder_has_lost(run: Run, tmp_path: Path):
    for iteration in (0, 2):
        run.train(1, iteration)
    copy_for_checkpoint(run.folder, 2, tmp_path / "saved.jsonl")
    bare = Run(tmp_path / "elsewhere")
    restore(bare.folder, tmp_path / "saved.jsonl", 2, bare.learner)
    bare.close()
    (entry,) = entries(bare.folder)
    assert (entry.iteration, entry.prompts, entry.trained) == (0, [0, 1], [(0, 0), (1, 0)])


def test_a_line_that_was_cut_off_is_passed_over(run: Run):
    run.train(1, 0)
    run.learner.close()
    path = run.folder / LEARNER_FILE
    path.write_text(path.read_text() + '{"event": "trained", "iterat')
    again = LedgerFile(path)
    again.write("trained", iteration=1, generation=1, trajectories=[[0, 0], [1, 0]])
    again.close()
    assert [entry.iteration for entry in entries(run.folder)] == [0, 1]
