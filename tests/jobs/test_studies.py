"""Studies: the statistics, the catalogue, and one tiny study from the command line to its tables."""

import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jobs import cli
from jobs.progress import read_metrics
from jobs.recipe import load_recipe
from jobs.studies.catalogue import STUDIES
from jobs.studies.intervals import Interval, interval, verdict
from jobs.studies.policy import finish, finished, jitter, run_policy_trial, warm_up_keys
from jobs.studies.run import check_variant, gain_of
from jobs.studies.study import Claim, TargetTask
from jobs.studies.trial import Trial, run_trial, save_untrained


def test_the_interval_is_students():
    values = [1.0, 2.0, 4.0, 4.5]
    low, high = stats.t.interval(0.95, 3, loc=2.875, scale=stats.sem(values))
    found = interval(values)
    assert (found.mean, found.low, found.high) == pytest.approx((2.875, low, high))
    assert math.isinf(interval([1.0]).half_width)


@pytest.mark.parametrize(
    ("gain", "margin", "said"),
    [
        (Interval(2, 1), 0.0, "holds"),
        (Interval(-2, 1), 0.0, "goes against it"),
        (Interval(0.5, 1), 0.0, "not told apart"),
        (Interval(-2, 1), 4.0, "holds"),
        (Interval(-2, 0.5), 1.0, "goes against it"),
    ],
)
def test_a_verdict_says_what_the_interval_allows(gain, margin, said):
    assert verdict(gain, margin) == said


def test_a_study_of_a_policy_takes_runs_that_are_done_as_they_are(tmp_path):
    trial = Trial(STUDIES["policy"], "grpo", 1, [f"run.dir={tmp_path}"], None, "")
    for name in ("warm-up-1", "grpo-1"):
        (tmp_path / name / "logs").mkdir(parents=True)
    finish(tmp_path / "warm-up-1", trial, warm_up_keys(trial))
    keys = [*trial.study.overrides("grpo", 1), *trial.overrides, f"run.dir={tmp_path}"]
    finish(tmp_path / "grpo-1", trial, keys, minutes=4.5)
    summary = {"accuracy_before": 0.2, "accuracy_after": 0.5, "logprob_gap": 1e-6}
    (tmp_path / "grpo-1" / "summary.json").write_text(json.dumps(summary))
    rows = [{"step": step, "reward": reward} for step, reward in enumerate((0.0, 0.25, 0.25, 0.5), start=1)]
    (tmp_path / "grpo-1" / "logs" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run_policy_trial(trial)
    other = replace(trial, overrides=[*trial.overrides, "ppo.iterations=7"])
    assert finished(tmp_path / "grpo-1", other, [*keys, "ppo.iterations=7"]) is None  # a run with other settings
    assert found == pytest.approx(
        {
            "before": 0.2,
            "after": 0.5,
            "gain": 0.3,
            "minutes": 4.5,
            "reward variance": 0.03125,
            "reward jitter": (0.0625 + 0 + 0.0625) / 3 / 2,
            "gap": 1e-6,
        }
    )


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_every_study_can_be_run(name, tmp_path):
    study, first = STUDIES[name], tmp_path / "first"
    if study.first:
        save_untrained(load_recipe(study.first), first)
    for variant in study.variants:
        check_variant(study, load_recipe(study.recipe, study.overrides(variant, 0, str(first))))
    for claim in study.claims:
        assert {claim.better, claim.worse} <= study.variants.keys()
        assert {claim.measure, claim.worse_measure or claim.measure} <= set(study.task.measures())


def test_a_gain_is_taken_seed_by_seed():
    study = STUDIES["positions"]
    results = {
        "alibi": {0: {"at 2048": 2.0, "at 128": 1.9}, 1: {"at 2048": 2.5, "at 128": 2.5}},
        "rope": {0: {"at 2048": 2.5}, 1: {"at 2048": 3.0}},
    }
    keeps, before_rope = study.claims[:2]
    assert gain_of(study, before_rope, results) == Interval(0.5, 0.0)
    assert gain_of(study, keeps, results).mean == pytest.approx(-0.05)


def test_steps_to_a_target_are_those_of_the_first_evaluation_that_reaches_it():
    rows = [{"step": 1}, {"step": 2, "held_out_accuracy": 0.3}, {"step": 3}, {"step": 4, "held_out_accuracy": 0.5}]
    task = TargetTask("held_out_accuracy", 0.5, within=6)
    assert task.of([*rows, {"step": 5, "held_out_accuracy": 0.6}]) == {"steps": 4, "reached": 1.0}
    assert task.of(rows[:3]) == {"steps": 6, "reached": 0.0}
    assert TargetTask("held_out_accuracy", 0.5, within=3).of(rows) == {"steps": 3, "reached": 0.0}


def test_a_trial_may_be_a_whole_run_with_its_stages(tmp_path):
    small = ["model.hidden_size=32", "model.num_hidden_layers=1", "train.global_batch=4", "train.evaluate_every=1"]
    small += ["data.sources.words.tasks.size=60", "data.sources.words.tasks.held_out=6", "train.warmup_steps=0"]
    stages = "[{name: a, steps: 1, difficulty: [0, 0.5]}, {name: b, steps: 2}]"
    trial = Trial(STUDIES["curriculum"], "competence", 3, [*small, f"train.stages={stages}"], None, str(tmp_path / "x"))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(run_trial, trial).result()
    assert (found["steps"], found["reached"]) == (600, 0.0)
    rows = read_metrics(tmp_path / "competence-3", up_to=9)
    assert [row["stage"] for row in rows] == [1, 2, 2] and "held_out_accuracy" in rows[0]


def test_the_bench_of_curricula_is_a_study_with_five_seeds(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "curriculum", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "mmada bench curriculum" in shown and "(default: 5)" in shown


def test_a_study_from_the_command_line(tmp_path, capfd):
    small = ["train.steps=2", "train.warmup_steps=1", "train.global_batch=2", "data.limit_documents=60"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "experts", "--seeds", "2", "--processes", "2", "--json", str(tmp_path / "all.json"), *small])
    assert ended.value.code == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    for variant in STUDIES["experts"].variants:
        assert f"{variant}, seed 1:" in shown.out
    results = json.loads((tmp_path / "all.json").read_text())
    assert results.keys() == STUDIES["experts"].variants.keys()
    bits = results["dense"]["1"]["at 128"]
    assert 6 < bits < 9  # an untrained model of bytes needs about eight
    assert results["dense"]["0"]["at 128"] != bits


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recal"], "name=recal is no study; did you mean recall?"),
        (["recall", "--seeds", "1"], "argument --seeds: 1 is not a whole number from 2 on"),
        (["recall", "train.stepz=1"], "train.stepz=1 is not a key of a recipe"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_jitter_of_rewards_leaves_out_what_was_learned():
    assert jitter([0.0, 1.0, 2.0, 3.0]) == pytest.approx(0.5)
    assert jitter([1.0, 1.0, 1.0]) == 0
    noise = np.random.default_rng(0).normal(0, 0.3, 4000)
    assert jitter(list(noise + np.linspace(0, 5, 4000))) == pytest.approx(0.09, rel=0.1)


def test_a_claim_may_ask_for_a_margin_or_a_share():
    ahead, calmer = (
        Claim("a", "a", "after", worse_measure="before", margin=-0.2),
        Claim("a", "b", "jitter", lower_is_better=True, share=0.5),
    )
    assert ahead.words() == "a (after) at least 0.2 above a (before)"
    assert calmer.words() == "a at most 0.5 of b, jitter"
    results = {
        "a": {0: {"after": 0.7, "before": 0.3, "jitter": 1.0}, 1: {"after": 0.7, "before": 0.3, "jitter": 1.0}},
        "b": {0: {"jitter": 3.0}, 1: {"jitter": 3.0}},
    }
    assert gain_of(STUDIES["policy"], calmer, results).mean == pytest.approx(0.5)
    assert verdict(gain_of(STUDIES["policy"], ahead, results), ahead.margin) == "holds"
    assert verdict(Interval(0.15, 0.01), ahead.margin) == "goes against it"
