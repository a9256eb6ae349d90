"""From distributions to drawn numbers and back: values that a recipe can hold, and none outside of what was asked."""

from __future__ import annotations

import random
from typing import Any

import pytest
from scipy import stats

from jobs.recipe_schema_tune import DistributionSection
from jobs.tuning.space import corners, count_grid, dimensions, grid_values, settings_of, simplex_point


def section(**keys: Any) -> DistributionSection:
    return DistributionSection.model_validate(keys)


def test_what_a_grid_holds() -> None:
    assert grid_values(section(randint=[2, 4])) == [2, 3, 4]
    assert grid_values(section(quniform=[0.1, 0.4, 0.1])) == [0.1, 0.2, 0.3, 0.4]
    assert grid_values(section(choice=["a", None])) == ["a", None]
    thirds = section(simplex=["a", "b"], total=3, step=1)
    assert grid_values(thirds) == [[1, 2], [2, 1]]
    assert all(type(value) is int for point in grid_values(thirds) for value in point)
    four = section(simplex=["a", "b", "c"], step=0.1)
    assert count_grid(four) == len(grid_values(four)) == 36
    assert count_grid(section(uniform=[0, 1])) is None


def test_settings_have_the_types_that_a_recipe_wants() -> None:
    space = {
        "train.steps": section(quniform=[10.0, 50.0, 10.0]),
        "train.learning_rate": section(loguniform=[1e-4, 1e-2]),
        "train.warmup_steps": section(randint=[0, 5]),
        "train.weight_decay": section(quniform=[0.0, 0.5, 0.05]),
    }
    drawn = {
        "train.steps": 30.0,
        "train.learning_rate": 3e-3,
        "train.warmup_steps": 4,
        "train.weight_decay": 0.15000001,
    }
    found = settings_of(space, drawn)
    assert found == {
        "train.steps": 30,
        "train.learning_rate": 3e-3,
        "train.warmup_steps": 4,
        "train.weight_decay": 0.15,
    }
    assert type(found["train.steps"]) is int and type(found["train.weight_decay"]) is float


def test_a_simplex_sums_to_its_total_on_its_steps() -> None:
    generator = random.Random(0)
    lengths = section(simplex=["a", "b", "c"], total=300, step=10)
    weights = section(simplex=["a", "b", "c"])
    for _ in range(200):
        numbers = [generator.random() for _ in range(3)]
        steps = simplex_point(lengths, numbers)
        assert sum(steps) == 300 and all(type(each) is int and each >= 10 and each % 10 == 0 for each in steps)
        free = simplex_point(weights, numbers)
        assert sum(free) == pytest.approx(1) and min(free) > 0
        # Rounding to steps stays near the point itself.
        assert all(abs(each / 300 - share) < 0.1 for each, share in zip(steps, free, strict=True))


def test_points_of_a_simplex_are_spread_evenly() -> None:
    """Under Dirichlet(1, 1, 1) a coordinate is Beta(1, 2)."""
    generator = random.Random(1)
    weights = section(simplex=["a", "b", "c"])
    first = [simplex_point(weights, [generator.random() for _ in range(3)])[0] for _ in range(4000)]
    assert stats.kstest(first, stats.beta(1, 2).cdf).pvalue > 0.01


def test_a_star_stands_for_each_name() -> None:
    space = {"train.stages.*.steps": section(simplex=["text", "sums"], total=100, step=10)}
    assert [*dimensions(space)] == ["train.stages.*.steps#text", "train.stages.*.steps#sums"]
    found = settings_of(space, dict.fromkeys(dimensions(space), 0.5))
    assert found == {"train.stages.text.steps": 50, "train.stages.sums.steps": 50}
    whole = {"objectives.weights": section(simplex=["calibration", "safety"])}
    assert settings_of(whole, dict.fromkeys(dimensions(whole), 0.5)) == {
        "objectives.weights": {"calibration": 0.5, "safety": 0.5}
    }


def test_corners_reach_every_end() -> None:
    space = {
        "train.learning_rate": section(loguniform=[1e-4, 1e-2]),
        "train.warmup_steps": section(randint=[0, 5]),
        "train.schedule": section(choice=["cosine", "linear", "constant"]),
    }
    found = [*corners(space)]
    assert {(each["train.learning_rate"], each["train.warmup_steps"]) for each in found} >= {
        (1e-4, 0),
        (1e-2, 5),
        (1e-2, 0),
        (1e-4, 5),
    }
    assert {each["train.schedule"] for each in found} == {"cosine", "linear", "constant"}
