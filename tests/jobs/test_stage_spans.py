"""From which step to which a stage went, read off the metric of its number."""

from pathlib import Path

import pytest

from jobs.recipe import Recipe, load_recipe
from jobs.stage_spans import StageSpan, closing, opening, stage_spans


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Stages of 4, at most 6, and 4 steps."""
    stages = (
        "[{name: a, steps: 4, mixture: {text: 1}}, {name: b, steps: 6, advance: {when: plateau, metric: "
        "held_out_bits}}, {name: c, steps: 4}]"
    )
    return load_recipe("stages", [f"train.stages={stages}", f"run.dir={tmp_path}"])


def curve_of(*numbers: int) -> dict[int, float]:
    return {step: float(number) for step, number in enumerate(numbers, start=1)}


def test_stages_end_with_their_steps_or_when_the_next_begins(recipe: Recipe):
    assert stage_spans(recipe.train, {}, False) == []
    a = StageSpan(1, "a", 1, 4, 4, True)
    assert stage_spans(recipe.train, curve_of(1, 1), False) == [StageSpan(1, "a", 1, 2, 4, False)]
    assert stage_spans(recipe.train, curve_of(1, 1, 1, 1), False) == [a]  # nothing has been heard of the next
    early = curve_of(1, 1, 1, 1, 2, 2, 2, 3)
    spans = stage_spans(recipe.train, early, False)
    assert spans == [a, StageSpan(2, "b", 5, 7, 6, True), StageSpan(3, "c", 8, 8, 4, False)]
    assert [span.is_early for span in spans] == [False, True, False]
    # A run that is done after a step of its last stage has ended that one, too.
    assert stage_spans(recipe.train, early, True)[2].is_early


def test_a_stage_in_words(recipe: Recipe):
    spans = stage_spans(recipe.train, curve_of(1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3), True)
    assert [opening(recipe.train, span) for span in spans] == [
        "stage    a, 1 of 3: steps 1 to 4",
        "stage    b, 2 of 3: steps 5 to 10 at most",
        "stage    c, 3 of 3: steps 8 to 11",
    ]
    assert closing(spans) == "stages   a to step 4, b to step 7 (ended early, 6 steps were allowed), c to step 11"


def test_a_recipe_without_stages_has_none():
    assert stage_spans(load_recipe("debug").train, curve_of(1, 1), True) == []
