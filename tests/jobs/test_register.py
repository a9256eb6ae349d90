"""A checkpoint's model in MLflow's registry, loaded by a process that knows MLflow alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from cluster.checkpoints import MANIFEST, CheckpointStore
from cluster.errors import ClusterError
from cluster.tracking import Tracker
from jobs import register
from jobs.checkpointing import write_model
from jobs.model_building import build_model_of, model_config
from jobs.recipe import load_recipe
from mmada.data import load_tokenizer
from mmada.generate import stream_text
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import COMPONENTS, MMaDARewardModel


def a_run(folder: Path, name: str, kind: type) -> tuple[Path, str]:
    """A run with one checkpoint of an untrained model, recorded beside its folder: (checkpoint, MLflow id)."""
    recipe = load_recipe("debug", [f"run.dir={folder}", f"run.name={name}"])
    config, run_dir = model_config(recipe), folder / name
    store = CheckpointStore(run_dir / "checkpoints")
    partial = store.begin(5)
    model = build_model_of(kind, recipe, config)
    write_model(partial / "model", model.state_dict(), config, load_tokenizer("bytes"), kind.__name__)
    files = [str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()]
    checkpoint = store.seal(partial, store.file_entries(partial, files), {"step": 5})
    (run_dir / "recipe.yaml").write_text(recipe.resolved_yaml())
    tracker = Tracker(None, "registry", run_dir, name, system_metrics_seconds=60)
    run_id = tracker.start({})
    tracker.checkpoint(checkpoint, 5, 1)
    assert tracker.finish("done") == []
    return checkpoint, run_id


FRESH = """
import json, sys
import mlflow, pandas
text, reward = (mlflow.pyfunc.load_model(f"models:/{name}") for name in ("writer/2", "judge/1"))
table = pandas.DataFrame({"prompt": ["The ", "import os"], "completion": [None, " and sys"]})
said = text.predict(table, params={"max_new_tokens": 8, "temperature": 0.0})
judged = reward.predict(pandas.DataFrame({"prompt": ["2 + 2 = "], "completion": ["4"]}))
print(json.dumps([said.to_dict("list"), judged.to_dict("list"), sys.modules["mmada"].__file__]))
"""


def test_a_fresh_process_loads_and_predicts(tmp_path, capfd):
    checkpoint, run_id = a_run(tmp_path, "writer", MMaDAForCausalLM)
    judge, _ = a_run(tmp_path, "judge", MMaDARewardModel)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    capfd.readouterr()
    for _ in range(2):  # a run's folder, and its newest checkpoint is taken
        assert register.run(str(tmp_path / "writer"), "writer", None) == 0
    assert register.run(str(judge), "judge", None) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("registered")] == [
        f"registered {name} in {uri}" for name in ("writer version 1", "writer version 2", "judge version 1")
    ]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=elsewhere,
        env=environment | {"MLFLOW_TRACKING_URI": uri},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    said, judged, code = json.loads(done.stdout.splitlines()[-1])
    assert str(tmp_path / "mlartifacts") in code  # the code that was registered, whatever is installed
    greedy = "".join(stream_text(checkpoint / "model", "The ", max_new_tokens=8, temperature=0, top_p=1.0, seed=0))
    assert said["completion"] == [greedy, " and sys"]
    tokenizer = load_tokenizer("bytes")
    model = MMaDAForCausalLM.from_pretrained(checkpoint / "model").eval()
    prompt = tokenizer("import os")["input_ids"]
    ids = torch.tensor([[*prompt, *tokenizer(" and sys", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1)[0].gather(1, ids[0, 1:, None])
    assert said["log_likelihood"][1] == pytest.approx(float(logprobs[len(prompt) - 1 :].sum()), rel=1e-4)
    (expected,) = MMaDARewardModel.from_pretrained(judge / "model").score(tokenizer, ["2 + 2 = "], ["4"])
    assert judged == {
        name: [pytest.approx(value, rel=1e-4, abs=1e-6)]
        for name, value in {"reward": expected.reward, "confidence": expected.confidence, **expected.components}.items()
    }
    assert set(expected.components) == set(COMPONENTS)

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version("writer", "2")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert version.run_id == run_id
    assert version.tags == {
        "checkpoint.path": str(checkpoint),
        "checkpoint.step": "5",
        "checkpoint.bytes": str(size),
        "checkpoint.sha256": manifest["manifest_sha256"],
    }
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["checkpoint.sha256"] == manifest["manifest_sha256"]
    noted = json.loads(Path(client.download_artifacts(run_id, "checkpoints/step-00000005.json")).read_text())
    assert (noted["path"], noted["sha256"]) == (str(checkpoint), manifest["manifest_sha256"])
    assert noted["files"] == manifest["files"] and "model/model.safetensors" in noted["files"]


def test_what_cannot_be_registered(tmp_path, capsys):
    checkpoint, _ = a_run(tmp_path, "writer", MMaDAForCausalLM)
    alone = tmp_path / "exported"
    (checkpoint / "model").rename(alone)
    with pytest.raises(ClusterError, match="exported belongs to no run that is recorded in MLflow; .* --uri"):
        register.run(str(alone), "writer", None)
    with pytest.raises(ClusterError, match="NAME='a/b' is no name of a registered model; use one without / and :"):
        register.run(str(alone), "a/b", None)
    with pytest.raises(ClusterError, match="tracking.uri=http://127.0.0.1:9 does not answer"):
        register.run(str(alone), "writer", "http://127.0.0.1:9")
    assert capsys.readouterr().out == ""
