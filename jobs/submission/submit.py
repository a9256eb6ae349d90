"""``mmada submit``: a run checked here, measured against a cluster, sent there and followed."""

from __future__ import annotations

import getpass
import shlex
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.ray_jobs import RayJobs
from jobs.recipe import Recipe, RecipeError, find_recipe, load_recipe
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


def _check_train(recipe: Recipe) -> None:
    from jobs.recipe_checks import check

    check(recipe)


def _check_ppo(recipe: Recipe) -> None:
    from jobs.recipe_checks_ppo import check_ppo, completed

    check_ppo(completed(recipe))


def _check_on_the_cluster(recipe: Recipe) -> None:
    """What a search or a measurement needs beyond its recipe is checked where it runs, before it begins."""


@dataclass(frozen=True)
class Submittable:
    """A verb that makes sense as a job: ``check`` is what can be checked here of its recipe.

    ``num_cpus`` are set aside for the command itself: 0 for one that only drives others and may run on a head that
    does no work.
    """

    check: Callable[[Recipe], None]
    takes_recipe: bool = True
    num_cpus: int = 0


VERBS = {
    "train": Submittable(_check_train),
    "ppo": Submittable(_check_ppo),
    "tune": Submittable(_check_on_the_cluster),
    "evaluate": Submittable(_check_on_the_cluster, takes_recipe=False, num_cpus=1),
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
    recipe = load_recipe(file, [*order.overrides, JOINS_ITS_CLUSTER]) if file is not None else None
    jobs = RayJobs(order.address)
    jobs.version()
    if recipe is not None:
        there = check_room(recipe, jobs.nodes(), jobs)
        notes = [*check_recipe(recipe, verb.check), *not_sent(recipe, order.files)]
        say("cluster", there)
        for note in notes:
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
        say("run", f"{Path(inside.folder) / recipe.run_dir} there")
        if inside.is_at_home and not recipe.run_dir.is_absolute():
            say(
                "note",
                f"nobody named storage: --folder does, or {STORAGE_VARIABLE} on the cluster; this is its head's home",
            )
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
