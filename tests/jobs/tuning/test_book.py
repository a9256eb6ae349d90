"""What a sweep remembers of its trials when its driver dies at the worst moment."""

from __future__ import annotations

from pathlib import Path

from jobs.tuning.book import Book


def test_what_has_ended_stays_ended_for_a_tune_that_does_not_know(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.start("a_00000", {"x": 1})
    book.start("a_00001", {"x": 2})
    book.report("a_00000", {"step": 4, "loss": 2.0}, "loss")
    book.report("a_00000", {"step": 8, "loss": 1.0, "status": "done", "done": True}, "loss")
    before = book.trials[1]

    again = Book(tmp_path)
    assert again.identity == book.identity and again.trials[1] == before
    assert again.trials[2].status == "waiting"
    assert again.start("a_00000", {"x": 1}) == before  # Tune had not written down that it ended
    assert again.report("a_00000", {"step": 8, "loss": 1.0, "status": "done", "done": True}, "loss") == before


def test_a_trial_that_tune_draws_anew_keeps_its_number(tmp_path: Path) -> None:
    Book(tmp_path).start("a_00000", {"x": 1})
    again = Book(tmp_path)
    assert again.start("b_00003", {"x": 1}).number == 1
    assert again.start("b_00003", {"x": 5}).earlier == [{"until": 0, "settings": {"x": 1}}]
    assert again.start("b_00001", {"x": 7}).number == 2


def test_the_best_is_one_that_came_to_its_end(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for place, (value, status) in enumerate([(3.0, "done"), (1.0, "stopped"), (2.0, "done")]):
        name = f"a_{place:05d}"
        book.start(name, {"x": place})
        book.report(name, {"step": 4, "loss": value, "status": status}, "loss")
    assert (book.best("min"), book.best("max")) == (book.trials[3], book.trials[1])


def test_paused_trials_are_told_from_running_ones(tmp_path: Path) -> None:
    book = Book(tmp_path)
    for number, name in enumerate(("a", "b", "c")):
        book.start(name, {"x": number})
    book.end("c", None)
    book.pause({"a", "c"})
    assert [entry.status for entry in book.trials.values()] == ["paused", "running", "stopped"]
    book.start("a", {"x": 0})
    book.pause(set())
    assert [entry.status for entry in book.trials.values()] == ["running", "running", "stopped"]
    book.pause({"b"})
    assert [entry.status for entry in Book(tmp_path).trials.values()] == ["waiting", "waiting", "stopped"]


def test_what_tune_repeats_of_an_ended_trial_changes_nothing(tmp_path: Path) -> None:
    book = Book(tmp_path)
    book.start("a", {"x": 1})
    book.report("a", {"step": 3, "loss": 0.5, "mlflow_run_id": "run"}, "loss")
    book.end("a", None)
    before = (tmp_path / "sweep.json").read_text()
    again = Book(tmp_path)
    again.start("a", {"x": 1})
    again.report("a", {"step": 3, "status": "stopped", "done": True, "error": "told to stop"}, "loss")
    again.end("a", None)
    assert (tmp_path / "sweep.json").read_text() == before
