"""How the largest micro batch that fits is looked for, and recipes in which there is none to be found."""

from __future__ import annotations

import pytest

from jobs.cli import main
from jobs.micro_batch import Search, Usage, candidates, climb
from jobs.plan import Machine, make_plan, model_size
from jobs.recipe import RecipeError, load_recipe
from jobs.recipe_checks import check, checked_config
from jobs.recipe_checks_ppo import completed

SIZES = [1, 2, 3, 4, 6, 12]


class Device:
    """Something that a step takes ``fixed + per_row * rows`` bytes of, and no less than ``floor``."""

    def __init__(self, per_row: int, fixed: int = 0, floor: int = 0, holds: int = 10**9) -> None:
        self.per_row, self.fixed, self.floor, self.holds = per_row, fixed, floor, holds
        self.tried: list[int] = []

    def measure(self, rows: int) -> Usage | None:
        self.tried.append(rows)
        peak = max(self.floor, self.fixed + self.per_row * rows)
        return None if peak > self.holds else Usage(peak, self.per_row * rows)


@pytest.mark.parametrize("room", range(100, 1400, 50))
def test_the_largest_that_fits_is_found_and_nothing_larger_is_tried(room: int):
    device = Device(per_row=100, fixed=50)
    found = climb(SIZES, device.measure, room)
    expected = max((rows for rows in SIZES if 50 + 100 * rows <= room), default=0)
    assert found.rows == expected and found.peak == (50 + 100 * expected if expected else 0)
    assert all(50 + 100 * rows <= room for rows in device.tried if rows > 1)
    above = [rows for rows in SIZES if rows > expected]
    assert found.too_much == ((above[0], 50 + 100 * above[0]) if above else None)


def test_what_a_row_costs_is_not_taken_from_steps_that_the_optimizer_rules():
    """1, 2 and 4 rows take as much; a straight line through them would let expect the same of 97."""
    device = Device(per_row=100, floor=500)
    assert climb([1, 97], device.measure, 5000) == Search(1, 500, (97, 500 + 95 * 100))
    assert device.tried == [1, 2]


def test_memory_that_runs_out_ends_the_search():
    device = Device(per_row=100, holds=350)
    assert climb(SIZES, device.measure, 10**6) == Search(3, 300, (4, None))
    assert climb([1], Device(per_row=100, holds=50).measure, 10**6) == Search(0, 0, (1, None))


STAGES = "train.stages=[{name: a, steps: 2, global_batch: 24}, {name: b, steps: 2, global_batch: 36}]"


def test_candidates_divide_a_workers_rows_in_every_stage():
    assert candidates(load_recipe("debug", ["train.global_batch=24"])) == [1, 2, 3, 4, 6, 12]
    assert candidates(load_recipe("debug", ["train.steps=null", STAGES])) == [1, 2, 3, 6]


AUTO = "train.micro_batch=auto"


def refusal(capsys, *arguments: str) -> str:
    """What the command line says when it ends with exit code 2."""
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.micro_batch=big"], "train.micro_batch='big' is not a whole number or auto; write a whole number or "
         "auto without quotes"),
        (["train.micro_batch=0"], "train.micro_batch=0 is out of range; use at least 1"),
        ([AUTO, "cluster.memory_per_worker=0"], "cluster.memory_per_worker=0 is out of range; use more than 0"),
        ([AUTO, "objectives.combine=gradnorm"], "objectives.combine=gradnorm looks at the gradients of a whole step, "
         "and train.micro_batch=auto may cut it into several passes; leave train.micro_batch out"),
        ([AUTO, "objectives.combine=project"], "leave train.micro_batch out"),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_refused_in_one_line(overrides, line, capsys, tmp_path):
    error = refusal(capsys, "train", "debug", f"run.dir={tmp_path}", *overrides)
    assert line in error and error.count("\n") == 1


def test_verbs_that_find_nothing_say_so(capsys, tmp_path):
    said = refusal(capsys, "profile", "debug", f"run.dir={tmp_path}", AUTO)
    assert "give its rows, such as train.micro_batch=1" in said
    with pytest.raises(RecipeError, match=r"train.micro_batch=auto has no part in `mmada ppo`.*train.micro_batch=null"):
        completed(load_recipe("ppo-debug", [AUTO]))
    completed(load_recipe("ppo-debug", [AUTO, "train.micro_batch=null"]))


def plan_of(*overrides: str, memory: int = 2**40):
    recipe = load_recipe("debug", ["train.global_batch=24", *overrides])
    check(recipe)
    config = checked_config(recipe)
    return make_plan(recipe, config, model_size(config), Machine("here", cpus=2, gpus=0, memory=memory), None)


def test_a_plan_estimates_and_says_so():
    written = {
        rows: plan_of(f"train.micro_batch={rows}")
        for rows in candidates(load_recipe("debug", ["train.global_batch=24"]))
    }
    roomy = plan_of(AUTO)
    assert roomy.is_estimated and (roomy.batch.micro_batch, roomy.batch.accumulation) == (12, 1)
    assert roomy.worker_bytes == written[12].worker_bytes and not written[12].is_estimated
    limit = written[4].worker_bytes / 0.9 / 2**30 + 1e-6
    for narrow in (plan_of(AUTO, f"cluster.memory_per_worker={limit}"), plan_of(AUTO, memory=int(2 * limit * 2**30))):
        assert (narrow.batch.micro_batch, narrow.batch.accumulation) == (4, 3)
        assert narrow.worker_bytes == written[4].worker_bytes
    assert plan_of(AUTO, memory=2).batch.micro_batch == 1
    long = "train.stages=[{name: a, steps: 20}, {name: b, steps: 20, sequence_length: 256}]"
    assert plan_of(AUTO, "train.steps=null", long, f"cluster.memory_per_worker={limit}").batch.micro_batch < 4
