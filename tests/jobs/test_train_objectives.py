"""``mmada train`` on pairs and on problems as a user runs it, and what the driver says of them."""

import json
from pathlib import Path

import mlflow
import pytest

from jobs.objectives.registry import prepare_objective
from jobs.recipe import load_recipe
from tests.jobs.test_train import finish, start

PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1), "chosen_scores": {"correctness": 1}}
    for a in range(8)
    for b in range(8)
]
SMALL = ["data.limit_documents=null", "train.steps=3", "train.warmup_steps=1", "train.evaluate_every=2"]
ONE = ["cluster.workers=1", "cluster.expert_parallel=1"]


@pytest.mark.timeout(600)
def test_a_reward_model_is_trained_on_a_users_pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    keys = [
        "data.source=files",
        "data.path=pairs.jsonl",
        "data.held_out=0.3",
        "train.objective=reward",
        "run.name=mine",
    ]
    code, out, err = finish(start(tmp_path, *SMALL, *ONE, *keys))
    assert (code, err) == (0, ""), out + err
    run_dir = tmp_path / "mine"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "done" and summary["metrics"].keys() == {"loss", "pair_accuracy", "tokens_per_second"}
    assert "pairs of completions to learn from" in out and "held-out pairs ordered rightly (95 % interval" in out
    assert "held out" in out and "mmada evaluate mine/checkpoints/step-00000003" in out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = client.get_run(summary["mlflow_run_id"])
    history = client.get_metric_history(run.info.run_id, "pair_accuracy")
    assert [point.step for point in history] == [2, 3] and history[-1].value == summary["metrics"]["pair_accuracy"]
    assert {"ranking_loss", "proxy_loss", "confidence_loss", "confidence_brier"} <= run.data.metrics.keys()
    assert [a.path for a in client.list_artifacts(run.info.run_id, "figures")] == ["figures/learning_curve.png"]
    lines = [json.loads(line) for line in (run_dir / "logs" / "metrics.jsonl").read_text().splitlines() if line]
    assert "correctness_correlation" not in lines[-1]  # one value of the proxy says nothing

    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS[:-5])))
    code, out, err = finish(start(tmp_path, *SMALL, *ONE, *keys, "run.resume=true", "train.steps=4"))
    assert (code, out) == (2, "") and "data.source=files no longer gives what run.name=mine began with" in err


@pytest.mark.parametrize(
    ("keys", "metrics", "said"),
    [
        (
            ["data.source=tasks", "tasks.family=coin_flip", "tasks.held_out=3", "tasks.size=20"],
            {"bits_per_answer_byte": 1.25, "held_out_accuracy": 0.5},
            ["20 problems to learn from (5 of them different), 3 held out: coin_flip",
             "held out 1.250 bits/answer byte",
             "1.250 bits per held-out answer byte, 50.0 % of 3 held-out problems solved"],
        ),
        (
            ["data.source=tasks", "tasks.family=spell_backward", "tasks.held_out=3", "tasks.size=5",
             "train.objective=reward"],
            {"pair_accuracy": 0.75, "pair_accuracy_low": 0.6, "pair_accuracy_high": 0.9},
            ["20 pairs of completions to learn from, 12 held out", "held out 75.0 % of pairs",
             "75.0 % of 12 held-out pairs ordered rightly (95 % interval 60.0 to 90.0)"],
        ),
    ],
)  # fmt: skip
def test_what_the_driver_says(tmp_path: Path, keys, metrics, said):
    recipe = load_recipe("debug", [*SMALL, *keys, f"run.dir={tmp_path}", "train.sequence_length=400"])
    objective = prepare_objective(recipe)
    main = objective.held_out_metric
    assert [objective.announcement(), objective.headline(metrics[main]), objective.closing(metrics)] == said
    curves = {name: {2: value} for name, value in metrics.items()} | {"loss": {1: 2.0}, "ranking_loss": {1: 0.7}}
    labels = [line.get_label() for line in objective.figure(curves, "title").axes[0].lines]
    assert len(labels) == 2 and labels[1].startswith("held")
    assert "mmada evaluate here" in " ".join(objective.what_next("mmada", "here"))
