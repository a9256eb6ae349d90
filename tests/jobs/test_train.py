"""``mmada train`` as a user runs it: a real process, real Ray, DeepSpeed and MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load_file

from jobs.recipe import load_recipe
from tests.cluster.test_session import running_cluster  # noqa: F401 (a fixture)
from tests.jobs.test_resume import rows_read, tensors_of
from tests.patience import PATIENCE_S

MMADA = [sys.executable, "-m", "jobs.cli"]


def start(folder: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    keys = ["run.dir=.", "data.limit_documents=60", "cluster.threads_per_worker=1", *overrides]
    return subprocess.Popen(
        [*MMADA, "train", "debug", *keys],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | environment,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def wait_for(condition, process: subprocess.Popen, what: str):
    """The condition's value once it is true; the process must not end before."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert process.poll() is None, f"ended before {what}: {process.communicate()}"
        time.sleep(0.05)
    raise AssertionError(f"no {what} within {PATIENCE_S} s")


def sealed(run_dir: Path, step: int):
    return lambda: (run_dir / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").exists()


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Training workers of a run that are alive."""
    found = []
    for worker in json.loads((run_dir / "workers.json").read_text()):
        try:
            process = psutil.Process(worker["pid"])
            if process.status() != psutil.STATUS_ZOMBIE and "ray::" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs):
    """The debug recipe, uninterrupted: (exit code, output, errors, run folder)."""
    return *finish(start(runs, "run.name=whole")), runs / "whole"


@pytest.mark.timeout(600)
def test_the_debug_recipe_does_all_it_promises(whole):
    code, out, err, run_dir = whole
    assert (code, err) == (0, "")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "done" and summary["steps"] == 20
    assert set(summary["metrics"]) == {"loss", "bits_per_byte", "tokens_per_second"}
    assert 2 < summary["metrics"]["bits_per_byte"] < 7 and summary["metrics"]["tokens_per_second"] > 0
    assert Path(summary["checkpoint"]) == run_dir / "checkpoints" / "step-00000020"
    assert (run_dir / "recipe.yaml").exists()
    assert f"{summary['metrics']['bits_per_byte']:.3f} bits per held-out byte" in out and "xz -9" in out
    for chatter in ("WARNING", "Warning", "deepspeed", "ray.init", "INFO", "(TrainController", "Traceback"):
        assert chatter not in out


def test_mlflow_knows_the_run(whole, runs):
    run_dir = whole[3]
    summary = json.loads((run_dir / "summary.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    run = client.get_run(summary["mlflow_run_id"])
    assert run.info.status == "FINISHED" and run.info.run_name == "whole"
    assert run.data.params["cluster.expert_parallel"] == "2" and run.data.params["train.zero_stage"] == "2"
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == list(range(1, 21))
    assert losses[-1].value == summary["metrics"]["loss"] < losses[0].value
    rates = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "learning_rate")}
    assert rates[1] == pytest.approx(3e-3 / 5) and rates[5] == pytest.approx(3e-3) and rates[20] < 4e-4
    assert run.data.tags["checkpoint.path"] == summary["checkpoint"]
    assert [a.path for a in client.list_artifacts(run.info.run_id, "figures")] == ["figures/learning_curve.png"]


def test_no_process_is_left(whole):
    assert processes_of(whole[3]) == []


def test_export_and_generate_take_what_the_summary_names(whole, tmp_path):
    checkpoint = json.loads((whole[3] / "summary.json").read_text())["checkpoint"]
    made = subprocess.run([*MMADA, "export", checkpoint, str(tmp_path / "model")], capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    for source in (checkpoint, str(tmp_path / "model"), str(whole[3])):
        said = subprocess.run(
            [*MMADA, "generate", source, "The ", "--max-new-tokens", "12", "--seed", "1"],
            capture_output=True,
            text=True,
        )
        assert (said.returncode, said.stderr) == (0, "") and said.stdout.startswith("The ") and len(said.stdout) > 8


@pytest.mark.timeout(600)
def test_a_killed_worker_costs_nothing_but_time(whole, runs):
    """kill -9 of one worker after the first checkpoint: the same run, bit for bit."""
    often = ["train.keep_checkpoints=9", "train.checkpoint_every=2"]  # each save leaves time for the kill to strike
    process, run_dir = start(runs, "run.name=killed", *often), runs / "killed"
    wait_for(sealed(run_dir, 2), process, "checkpoint")
    victims = json.loads((run_dir / "workers.json").read_text())
    os.kill(victims[1]["pid"], signal.SIGKILL)
    code, out, err = finish(process)
    assert (code, err) == (0, ""), out + err
    assert "failed" in out and re.search(r"going on from step-000000(0[2-9]|1\d)", out)
    assert {w["pid"] for w in json.loads((run_dir / "workers.json").read_text())}.isdisjoint(w["pid"] for w in victims)

    name = "checkpoints/step-00000020"
    expected, found = tensors_of(whole[3] / name), tensors_of(run_dir / name)
    assert expected.keys() == found.keys() and len(expected) > 20
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    weights = [load_file(folder / name / "model" / "model.safetensors") for folder in (whole[3], run_dir)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert rows_read(run_dir) == rows_read(whole[3])  # steps that were done twice read the same rows
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    ids = [json.loads((folder / "summary.json").read_text())["mlflow_run_id"] for folder in (whole[3], run_dir)]
    curves = [[(p.step, p.value) for p in client.get_metric_history(i, "loss")] for i in ids]
    assert curves[0] == curves[1]


@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_run_cleanly_and_resume_continues_it_with_one_worker(runs):
    process, run_dir = start(runs, "run.name=stopped", "train.steps=2000"), runs / "stopped"
    wait_for(sealed(run_dir, 10), process, "checkpoint")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (130, ""), (out, err)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed" and "run.resume=true" in out
    assert processes_of(run_dir) == []
    client = mlflow.MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    assert client.get_run(summary["mlflow_run_id"]).info.status == "FAILED"

    reached = max(int(path.name[-8:]) for path in (run_dir / "checkpoints").glob("step-????????"))
    one_worker = ["cluster.workers=1", "cluster.expert_parallel=1", f"train.steps={reached + 10}"]
    again = start(runs, "run.name=stopped", "run.resume=true", *one_worker)
    code, out, err = finish(again)
    assert (code, err) == (0, "") and "converted" in out, (out, err)
    assert not (run_dir / "universal").exists()  # what was converted has served
    continued = json.loads((run_dir / "summary.json").read_text())
    assert continued["status"] == "done" and continued["steps"] == reached + 10
    assert continued["mlflow_run_id"] == summary["mlflow_run_id"]
    assert client.get_run(summary["mlflow_run_id"]).info.status == "FINISHED"


@pytest.mark.timeout(600)
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(runs, tmp_path):
    """A real file system of a few megabytes holds one checkpoint and not two."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        process = start(small, "run.name=full", "cluster.max_failures=0", "train.keep_checkpoints=9",
                        "train.checkpoint_every=5")  # fmt: skip
        code, out, err = finish(process)
        assert (code, err) == (1, ""), (out, err)
        assert "is full" in out and "last good checkpoint is" in out
        summary = json.loads((small / "full" / "summary.json").read_text())
        assert summary["status"] == "failed" and Path(summary["checkpoint"]).is_dir()
        checked = subprocess.run([*MMADA, "generate", summary["checkpoint"], "a", "--max-new-tokens", "2"])
        assert checked.returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_run_whose_text_has_changed_is_not_gone_on_with(tmp_path):
    """Refused before Ray starts, so it needs no run that was finished: only the record that one leaves."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdefgh":
        (texts / f"{name}.txt").write_text(f"a text about {name}. " * 40)
    keys = ["data.source=files", f"data.path={texts}", "data.limit_documents=8", "run.name=changed"]
    recipe = load_recipe("debug", [f"run.dir={tmp_path}", *keys, "run.resume=true"])
    recipe.run_dir.mkdir()
    (recipe.run_dir / "recipe.yaml").write_text(recipe.resolved_yaml())
    (recipe.run_dir / "run.json").write_text(json.dumps({"data": "of another text", "mlflow_run_id": "x"}))
    code, out, err = finish(start(tmp_path, *keys, "run.resume=true"))
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1 and "data.source=files no longer gives what" in err and "restore it" in err


def test_a_used_name_is_refused_in_one_line(whole, runs):
    code, out, err = finish(start(runs, "run.name=whole"))
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "run.name=whole" in err and "run.resume=true" in err


@pytest.mark.timeout(600)
def test_a_running_cluster_is_joined_and_gives_the_same_curve(whole, runs, running_cluster):  # noqa: F811
    address, home = running_cluster
    code, out, err = finish(start(runs, "run.name=joined", f"cluster.address={address}", HOME=str(home)))
    assert (code, err) == (0, ""), out + err
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole[3], runs / "joined")]
    assert summaries[0]["metrics"]["loss"] == summaries[1]["metrics"]["loss"]
    assert summaries[0]["metrics"]["bits_per_byte"] == summaries[1]["metrics"]["bits_per_byte"]
    assert processes_of(runs / "joined") == []
