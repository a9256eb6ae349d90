"""``mmada submit``: a run checked here, measured against a cluster, sent there and followed."""

from __future__ import annotations

import getpass
import shlex
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.ray_jobs import RayJobs
from jobs.recipe import Recipe, RecipeError, find_recipe, load_values, recipe_of
from jobs.submission.look import STORAGE_VARIABLE, Inside, look_inside
from jobs.submission.package import Package, make_package
from jobs.submission.pins import needed_pins, requirements
from jobs.submission.room import check_room, files_elsewhere, relative_files
from jobs.submission.watch import follow, pick_up, say
from jobs.wording import listed, suggestion

# Ray gives a job that is stopped three seconds before it kills it; a run that ends by itself also ends its workers,
# its summary and its run in MLflow.
STOP_SECONDS = 60
JOINS_ITS_CLUSTER = "cluster.address=auto"


def _check_train(recipe: Recipe, values: dict[str, Any], jobs: RayJobs, nodes: list[dict]) -> list[str]:
    from jobs.submission.planning import plan_at

    return list(plan_at(recipe, jobs, nodes).warnings)


def _check_ppo(recipe: Recipe, values: dict[str, Any], jobs: RayJobs, nodes: list[dict]) -> list[str]:
    from jobs.recipe_checks_ppo import check_ppo, completed

    check_ppo(completed(recipe))
    return []


def _check_tune(recipe: Recipe, values: dict[str, Any], jobs: RayJobs, nodes: list[dict]) -> list[str]:
    from jobs.recipe_checks_tune import check_tune
    from jobs.tuning.room import trials_at_once

    trials_at_once(check_tune(values), nodes)
    return []


def _check_there(recipe: Recipe, values: dict[str, Any], jobs: RayJobs, nodes: list[dict]) -> list[str]:
    """What a measurement needs beyond its recipe is checked where it runs, before it begins."""
    return []


@dataclass(frozen=True)
class Submittable:
    """A verb that makes sense as a job: ``check`` is what can be checked here of its recipe and the values
    that it was made of, and gives doubts.

    ``num_cpus`` are set aside for the command itself: 0 for one that only drives others and may run on a head that
    does no work.
    """

    check: Callable[[Recipe, dict[str, Any], RayJobs, list[dict]], list[str]]
    takes_recipe: bool = True
    num_cpus: int = 0


VERBS = {
    "train": Submittable(_check_train),
    "ppo": Submittable(_check_ppo),
    "tune": Submittable(_check_tune),
    "evaluate": Submittable(_check_there, takes_recipe=False, num_cpus=1),
}


@dataclass(frozen=True)
class Order:
    """What is asked for: ``mmada VERB TARGET overrides`` on the cluster at ``address``.

    ``folder``: on the cluster, for relative paths; None leaves it to the cluster. ``files``: travel with the job.
    """

    address: str | None
    verb: str
    target: str
    overrides: tuple[str, ...] = ()
    folder: str | None = None
    files: tuple[str, ...] = ()
    is_detached: bool = False


def run(order: Order, known_verbs: Iterable[str]) -> int:
    """Submit and follow; the job's exit code. ``known_verbs``: those that mmada has.

    Raises RecipeError, DataError or ClusterError before anything is queued.
    """
    verb = _verb(order.verb, known_verbs)
    for override in order.overrides:
        if override.startswith("cluster.address=") and override != JOINS_ITS_CLUSTER:
            raise RecipeError(
                f"{override} has no part in a submitted run, which joins the cluster of --address; leave it out"
            )
    file = find_recipe(order.target) if verb.takes_recipe else None
    values = load_values(file, [*order.overrides, JOINS_ITS_CLUSTER]) if file is not None else {}
    recipe = recipe_of(values) if file is not None else None
    jobs = RayJobs(order.address)
    jobs.version()
    if recipe is not None:
        nodes = jobs.nodes()
        there = check_room(recipe, nodes, jobs)
        if elsewhere := files_elsewhere(recipe):
            notes = [f"not on this machine: {listed(elsewhere, 'and')}; the job checks the recipe on the cluster"]
        else:
            notes = verb.check(recipe, values, jobs, nodes)
        say("cluster", there)
        for note in [*notes, *not_sent(recipe, order.files)]:
            say("note", note)
    package = make_package(file, order.files)
    job_id = submit(jobs, order, verb, recipe, file, package)
    if order.is_detached:
        say("follow", pick_up(job_id, order.address))
        return 0
    return follow(jobs, job_id, order.address)


def submit(
    jobs: RayJobs, order: Order, verb: Submittable, recipe: Recipe | None, file: Path | None, package: Package
) -> str:
    """Send everything and start the job; its name on the cluster."""
    wanted = requirements(with_tasks=recipe is None or recipe.tasks is not None)
    inside = look_inside(jobs, wanted, order.folder)
    pins = needed_pins(inside.versions, wanted, jobs.address)
    uri = jobs.upload(package.content, package.name)
    installed = f"; to install there: {', '.join(pins)}" if pins else ""
    say("sent", f"{package.num_files} files, {package.size}{installed}")
    name = recipe.run.name if recipe is not None else order.verb
    job_id = f"mmada-{name}-{uuid.uuid4().hex[:6]}"
    command = [order.verb, file.name if file is not None else order.target, *order.overrides]
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    runtime_env: dict[str, object] = {"working_dir": uri, "env_vars": environment}
    if pins:
        runtime_env["pip"] = {"packages": pins, "pip_check": False}
    jobs.submit(
        job_id,
        entrypoint(inside, command, joins=recipe is not None, has_own_environment=bool(pins)),
        runtime_env=runtime_env,
        metadata={"mmada": shlex.join(command), "folder": inside.folder, "user": _user()},
        entrypoint_num_cpus=verb.num_cpus or None,
    )
    say("job", f"{job_id}, in {inside.folder} on the cluster")
    if recipe is not None:
        place = f"{recipe.run.dir}/{recipe.run.name}"
        is_relative = not place.startswith(("/", "~"))
        say("run", f"{Path(inside.folder) / place if is_relative else place} there")
        if inside.is_at_home and is_relative:
            say("note", f"{inside.folder} is in its head's home; --folder, or {STORAGE_VARIABLE} there, names storage")
    return job_id


def entrypoint(inside: Inside, command: list[str], joins: bool, has_own_environment: bool) -> str:
    """The job's shell command. Where Ray installs packages for it, the python on its PATH is the one that has them."""
    python = "python" if has_own_environment else inside.python
    own = [JOINS_ITS_CLUSTER] if joins else []
    return "exec " + shlex.join([python, "-m", "jobs.submission.inside", inside.folder, *command, *own])


def not_sent(recipe: Recipe, sent: Iterable[str]) -> list[str]:
    """Notes on files that are here under a relative path, and stay here."""
    travelling = [Path(name).resolve() for name in sent]
    found = []
    for key, name in relative_files(recipe):
        path = Path(name).resolve()
        if path.exists() and not any(path.is_relative_to(each) for each in travelling):
            found.append(f"{key}={name} is looked for in the job's folder on the cluster; --with {name} sends yours")
    return found


def _verb(name: str, known: Iterable[str]) -> Submittable:
    can = [verb for verb in VERBS if verb in known]
    if name in can:
        return VERBS[name]
    if name in known:
        raise RecipeError(f"verb={name} runs here and not as a job; submit {listed(can)}")
    raise RecipeError(f"verb={name} is unknown; {suggestion(name, can)}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        return "unknown"
