"""Runs submitted as a user does it: from another folder, to a real head that is guarded by a token."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.errors import ClusterError
from cluster.ray_jobs import RayJobs
from jobs import cli
from jobs.recipe import RecipeError, load_recipe
from jobs.submission import package as packages
from jobs.submission.look import Inside
from jobs.submission.package import make_package
from jobs.submission.pins import needed_pins, pins, requirements
from jobs.submission.room import check_room, files_elsewhere
from jobs.submission.submit import entrypoint
from tests.cluster.head import TOKEN, plain_environment
from tests.cluster.test_ray_jobs import head, token  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]
SMALL = {
    "run": {"name": "sent"},
    "model": {"preset": "travelled"},
    "data": {"limit_documents": 20},
    "train": {"steps": 4, "global_batch": 4, "sequence_length": 64, "evaluate_rows": 4},
}


@pytest.fixture(scope="module")
def changed_tree(tmp_path_factory) -> Path:
    """A copy of this checkout in which one thing is new: a preset that nobody else has."""
    root = tmp_path_factory.mktemp("tree")
    for name in packages.PACKAGES:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in packages.ALSO:
        shutil.copy(ROOT / name, root / name)
    with open(root / "mmada" / "presets.py", "a") as file:
        file.write('\nPRESETS["travelled"] = PRESETS["debug"]\n')
    return root


class User:
    """Someone in a folder of their own who has a checkout and the cluster's token."""

    def __init__(self, folder: Path, tree: Path, url: str):
        self.folder = folder
        self.environment = plain_environment(
            PYTHONPATH=str(tree),
            RAY_AUTH_TOKEN=TOKEN,
            RAY_API_SERVER_ADDRESS=url,
            HOME=str(folder),
            PYTHONUNBUFFERED="1",
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self, *arguments: str, timeout: float = 200) -> tuple[int, str, str]:
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err


class Here:
    """The same user's command lines in this process, which has loaded torch once."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def says(self, *arguments: str) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main(arguments)
        return exited.value.code, *self.capsys.readouterr()


@pytest.fixture
def here(user, token, capsys):  # noqa: F811
    token.chdir(user.folder)
    token.setenv("RAY_API_SERVER_ADDRESS", user.environment["RAY_API_SERVER_ADDRESS"])
    return Here(capsys)


@pytest.fixture
def user(tmp_path, changed_tree, head):  # noqa: F811
    return User(tmp_path, changed_tree, head[0])


def test_a_run_is_sent_left_picked_up_and_ends_where_its_recipe_says(user, here, head):  # noqa: F811
    (user.folder / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    (user.folder / "texts").mkdir()
    (user.folder / "texts" / "one.txt").write_text("a small thing that travels")
    first = user.start("submit", "train", "mine.yaml", "train.learning_rate=2e-3", "--with", "texts")
    printed = []
    for line in first.stdout:
        printed.append(line)
        if line.startswith("data "):
            break
    first.kill()  # as if the laptop had been closed
    first.communicate(timeout=60)
    text = "".join(printed)
    assert "3 CPU and 0 GPU on 1 node at" in text, text
    (job_id,) = [line.split()[1].rstrip(",") for line in printed if line.startswith("job ")]

    code, out, err = user.says("logs", job_id, "--follow")
    assert (code, err) == (0, "")
    assert "starting 1 worker" in out and "step     4/4" in out
    assert out.splitlines()[-1].startswith(f"job      {job_id} done after 0:")

    storage = head[1]
    run_dir = storage / "runs" / "sent"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("done", 4)
    assert yaml.safe_load((run_dir / "recipe.yaml").read_text())["train"]["learning_rate"] == 2e-3
    assert (storage / "texts" / "one.txt").read_text() == "a small thing that travels"

    # The same again: refused by the run itself, there, and said here.
    code, out, _ = here.says("submit", "train", "mine.yaml", "model.preset=debug")
    assert code == 2
    assert "mmada: run.name=sent has been used already" in out
    second = out.splitlines()[-1].split()[1]
    assert out.splitlines()[-1].startswith(f"job      {second} failed (2) after 0:")
    code, out, _ = here.says("logs", second)
    assert code == 0 and "run.name=sent has been used already" in out

    code, out, _ = here.says("jobs")
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and list(rows) == ["job", second, job_id]  # none of those by which a cluster was looked at
    assert " failed (2) " in rows[second] and " done " in rows[job_id]
    assert rows[job_id].endswith("train mine.yaml train.learning_rate=2e-3")


def test_a_job_is_stopped_by_name_and_its_follower_told(user, head, token):  # noqa: F811
    jobs = RayJobs(head[0])
    jobs.submit("mmada-sleeper-1", "echo asleep; sleep 600")
    follower = user.start("logs", "mmada-sleeper-1", "--follow")
    for line in follower.stdout:
        if line == "asleep\n":
            break
    impatient = user.start("logs", "mmada-sleeper-1", "--follow")
    for line in impatient.stdout:
        if line == "asleep\n":
            break
    impatient.send_signal(signal.SIGINT)
    _, err = impatient.communicate(timeout=60)
    assert impatient.returncode == 130
    assert err.strip() == "left; the job goes on: mmada logs mmada-sleeper-1 --follow"

    code, _, err = user.says("stop", "mmada-sleepr-1")
    guess = "did you mean mmada-sleeper-1?"
    assert (code, err) == (2, f"mmada: job=mmada-sleepr-1 is not known at {head[0]}; {guess}\n")
    code, out, err = user.says("stop", "mmada-sleeper-1")
    assert (code, err) == (0, "")
    assert out.startswith("job      mmada-sleeper-1 stopped after 0:")
    out, err = follower.communicate(timeout=60)
    assert follower.returncode == 143
    assert out.splitlines()[-1].startswith("job      mmada-sleeper-1 stopped after 0:")
    code, out, _ = user.says("stop", "mmada-sleeper-1")
    assert (code, out) == (0, "job      mmada-sleeper-1 has ended already: stopped\n")


def test_what_cannot_run_is_refused_before_anything_is_queued(tmp_path, here, head, token):  # noqa: F811
    url = head[0]
    before = len(RayJobs(url).jobs())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL | {"model": {"preset": "debug"}}))
    room = (
        "mmada: cluster.workers=4 workers of 1 CPU do not fit: there is room for 3 (3 CPU and 0 GPU on 1 node); "
        "use cluster.workers=3 or add nodes, or ask for less for each worker, or wait for nodes with "
        "cluster.queue_timeout=600"
    )
    for arguments, line in [
        (["submit", "train", "mine.yaml", "cluster.workers=4"], room),
        (["plan", "mine.yaml", "cluster.workers=4", "--address", url], room),
        (["submit", "tune", "tune-debug", "tune.metric=bits"], "mmada: tune.metric=bits is never evaluated"),
        (["submit", "tune", "tune-debug", "tune.max_concurrent=4"], "mmada: tune.max_concurrent=4 trials at a time do"),
        (["submit", "export", "runs/x"], "mmada: verb=export runs here and not as a job; submit train, ppo"),
        (["submit", "train", "mine.yaml", "model.num_experts=x"], "mmada: model.num_experts='x' is not a whole number"),
        (["submit", "train", "mine.yaml", "cluster.address=a:1"], "mmada: cluster.address=a:1 has no part in a"),
        (["submit", "train", "mine.yaml", "--with", "/etc/hosts"], "mmada: --with=/etc/hosts is not below the working"),
        (
            ["submit", "train", "mine.yaml", "--folder", "/proc/x"],
            "mmada: --folder=/proc/x cannot be written to on the",
        ),
        (["submit", "train", "mine.yaml", "--address", "127.0.0.1:1"], "mmada: address=http://127.0.0.1:1 does not"),
    ]:
        code, _, err = here.says(*arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith(line)
    assert len(RayJobs(url).jobs()) == before + 1  # the look that found --folder unfit
    token.setenv("RAY_AUTH_TOKEN", "wrong")
    code, out, err = here.says("submit", "train", "mine.yaml")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"address={url} does not take the access token of RAY_AUTH_TOKEN" in err


def test_room_is_measured_with_all_actors_and_a_queue_is_waited_in(head, token):  # noqa: F811
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    jobs = RayJobs(head[0])
    assert "room for 2 workers of 1 CPU" in check_room(load_recipe("debug"), nodes, jobs)
    with pytest.raises(ClusterError, match="and the actors beside them, 2 CPU in all, do not fit"):
        check_room(load_recipe("ppo-debug", ["ppo.rollout_workers=2", "ppo.rollout_cpus=1"]), nodes, jobs)
    waiting = load_recipe("debug", ["cluster.workers=8", "cluster.queue_timeout=60"])
    assert "will wait up to 60 s for 8 workers of 1 CPU" in check_room(waiting, nodes, jobs)


def test_a_package_is_the_tree_as_it_stands_and_no_more_than_that(changed_tree, tmp_path, monkeypatch):
    import io
    import zipfile

    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("run: {name: x}")
    for name in ("data/a.txt", "data/.git/config", "data/runs/big", "data/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * 100)
    (changed_tree / "runs").mkdir(exist_ok=True)
    (changed_tree / "runs" / "weights").write_text("x")
    package = make_package(recipe, ["data"], root=changed_tree)
    names = zipfile.ZipFile(io.BytesIO(package.content)).namelist()
    assert {"jobs/recipes/debug.yaml", "mmada/presets.py", "constraints.txt", "submitted/mine.yaml"} <= set(names)
    assert [name for name in names if name.startswith("sent/")] == ["sent/data/a.txt"]
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]

    assert make_package(recipe, ["data"], root=changed_tree).name == package.name
    (tmp_path / "data" / "a.txt").write_text("y")
    assert make_package(recipe, ["data"], root=changed_tree).name != package.name

    (tmp_path / "data" / "big.bin").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(RecipeError, match=r"at most 2 MiB travel .*the largest file is data/big.bin, 3 MiB"):
        make_package(recipe, ["data"], root=changed_tree, limit=2 * 2**20)
    for wrong in ("nothing", "..", "data/../.."):
        with pytest.raises(RecipeError, match="--with="):
            make_package(recipe, [wrong], root=changed_tree)


def test_pins_travel_where_the_cluster_has_another_version_or_none():
    wanted = requirements(with_tasks=True)
    assert {"ray", "torch", "reasoning-gym"} <= wanted.keys()
    assert "reasoning-gym" not in requirements(with_tasks=False)
    pinned = pins(list(wanted))
    assert f"torch=={pinned['torch']}\n" in (ROOT / "constraints.txt").read_text()
    there = {name: pinned[name] for name in wanted} | {"torch": pinned["torch"] + "+cu130"}
    assert needed_pins(there, wanted, "there") == []
    there |= {"mlflow": None, "rich": "13.0.0"}
    assert needed_pins(there, wanted, "there") == [f"mlflow=={pinned['mlflow']}", f"rich=={pinned['rich']}"]
    for old in ("2.40.0", None):
        with pytest.raises(ClusterError, match=f"address=there runs ray {old}, and mmada needs >=2.60"):
            needed_pins(there | {"ray": old}, wanted, "there")

    inside = Inside("/opt/venv/bin/python", "/mnt/a b", {})
    line = entrypoint(inside, ["train", "x.yaml"], joins=True, has_own_environment=False)
    assert line == ("exec /opt/venv/bin/python -m jobs.submission.inside '/mnt/a b' train x.yaml cluster.address=auto")
    assert entrypoint(inside, ["train", "x.yaml"], joins=True, has_own_environment=True).startswith("exec python -m")


def test_files_of_the_cluster_are_not_looked_for_here(tmp_path):
    here = tmp_path / "here.txt"
    here.write_text("text")
    changes = ["data.source=files", "train.start_from=/mnt/runs/x"]
    recipe = load_recipe("debug", [*changes, f"data.path={here}"])
    assert files_elsewhere(recipe) == ["train.start_from=/mnt/runs/x"]
    recipe = load_recipe("debug", [*changes, "data.path=/mnt/texts"])
    assert files_elsewhere(recipe) == ["data.path=/mnt/texts", "train.start_from=/mnt/runs/x"]
