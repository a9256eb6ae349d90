"""Runs that stand under one another in MLflow, in the file used by default."""

from mlflow import MlflowClient

from cluster.tracking import Tracker
from cluster.tracking_tree import end_runs_below


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


def test_a_run_of_an_identity_is_found_again_and_what_waits_for_it_is_sent(tmp_path):
    """Killed before its maker has remembered an id, or with things that MLflow does not have yet."""

    def tracker(folder):
        return Tracker(None, "tree", tmp_path / folder, "trial", identity="sweep/1", system_metrics_seconds=0)

    first = tracker("trial")
    run_id = first.start({"tune": {"space": {"train.stages.*.steps": 3}}})  # a * is nothing for MLflow
    first.log(1, {"loss": 2.0})
    first._writers.close(0)  # as a killed process leaves it
    first._buffer.close()
    again = tracker("trial")
    assert again.start({}) == run_id
    again.log(2, {"loss": 1.0})
    assert again.finish("done") == []
    client = MlflowClient(tracking_uri=again.uri)
    assert client.get_run(run_id).data.params == {"tune.space.train.stages._.steps": "3"}
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2]
    elsewhere = tracker("other")  # nothing on disk: the tag alone
    assert elsewhere.start({}) == run_id
    assert elsewhere.finish("done") == []


def test_runs_below_a_sweep_are_ended_as_what_they_were(tmp_path):
    runs = {}
    for place in ("sweep/1", "sweep/2", "sweep/2/1", "other/1"):
        one = Tracker(None, "tree", tmp_path / place.replace("/", "-"), place, identity=place, system_metrics_seconds=0)
        runs[place] = one.start({})
        one._writers.close(0)
        one._buffer.close()
    assert end_runs_below(one.uri, "tree", "sweep", done={2}) == 3
    client = MlflowClient(tracking_uri=one.uri)
    assert {place: client.get_run(run).info.status for place, run in runs.items()} == {
        "sweep/1": "KILLED",
        "sweep/2": "FINISHED",
        "sweep/2/1": "FINISHED",
        "other/1": "RUNNING",
    }


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
