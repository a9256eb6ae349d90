"""Runs that stand under one another in MLflow, in the file used by default."""

from mlflow import MlflowClient

from cluster.tracking import Tracker


def test_a_run_stands_under_another_and_stays_there(tmp_path):
    sweep = Tracker(None, "tree", tmp_path / "sweep", "sweep", tags={"mmada.kind": "sweep"})
    parent = sweep.start({})
    keywords = {"parent_run_id": parent, "tags": {"mmada.kind": "trial", "mmada.trial": 3}}
    trial = Tracker(None, "tree", tmp_path / "trial", "trial 3", **keywords)
    run_id = trial.start({"train.steps": 5})
    assert trial.finish("stopped") == []
    client = MlflowClient(tracking_uri=trial.uri)
    assert client.get_run(run_id).info.status == "KILLED"
    again = Tracker(None, "tree", tmp_path / "trial", "trial 3", run_id=run_id, **keywords)
    assert again.start({"train.steps": 5}) == run_id
    assert again.finish("done") == [] == sweep.finish("done")

    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert {name: run.data.tags[name] for name in ("mlflow.parentRunId", "mmada.kind", "mmada.trial")} == {
        "mlflow.parentRunId": parent,
        "mmada.kind": "trial",
        "mmada.trial": "3",
    }
    assert "mlflow.parentRunId" not in client.get_run(parent).data.tags
    below = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [found.info.run_id for found in below] == [run_id]


def test_a_parameter_that_changes_is_a_curve_and_its_newest_value(tmp_path):
    tracker = Tracker(None, "tree", tmp_path / "run", "run")
    run_id = tracker.start({"train": {"learning_rate": 0.1}})
    tracker.changed(5, {"train.learning_rate": 0.2, "model.preset": "tiny", "train.resume": True})
    tracker.changed(9, {"train.learning_rate": 0.16})
    assert tracker.finish("done") == []
    client = MlflowClient(tracking_uri=tracker.uri)
    run = client.get_run(run_id)
    assert run.data.params == {"train.learning_rate": "0.1"}
    assert {name: value for name, value in run.data.tags.items() if name.startswith("changed.")} == {
        "changed.train.learning_rate": "0.16",
        "changed.model.preset": "tiny",
        "changed.train.resume": "True",
    }
    history = client.get_metric_history(run_id, "changed.train.learning_rate")
    assert [(point.step, point.value) for point in history] == [(5, 0.2), (9, 0.16)]
    assert [name for name in run.data.metrics if not name.startswith("system/")] == ["changed.train.learning_rate"]
