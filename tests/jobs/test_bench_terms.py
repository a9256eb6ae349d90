"""The bench of losses runs and measures what it says. What it measures is no test."""

import json

from jobs.bench import terms as bench


def test_every_term_takes_its_turns_with_weight_and_without(tmp_path, capfd):
    file = tmp_path / "figures.json"
    assert bench.run(["--quick", "--threads", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    names = [f"{name}, weight {weight}" for name in ("calibration", "compute", "safety") for weight in (0, 1)]
    assert [*figures["milliseconds"]] == [bench.FLOOR, *names]
    assert all(len(times) == 2 and min(times) > 0 for times in figures["milliseconds"].values())
    out, err = capfd.readouterr()
    assert "times a step without terms" in out and "2 rounds of 1 steps" in out and err == ""


def test_recipes_differ_in_their_weights_alone(tmp_path):
    recipes = bench.recipes_for(tmp_path, [])
    plain = recipes.pop(bench.FLOOR)
    assert plain.objectives is None and plain.train.zero_stage == 0
    for name, recipe in recipes.items():
        term, weight = name.split(", weight ")
        assert recipe.objectives is not None and recipe.objectives.weights == {term: float(weight)}
        assert recipe.model_copy(update={"objectives": None}) == plain
