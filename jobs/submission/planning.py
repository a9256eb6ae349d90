"""``mmada plan --address``: a recipe measured against a cluster that is somewhere else."""

from __future__ import annotations

from cluster.ray_jobs import RayJobs
from jobs.plan import Plan, make_plan, model_size
from jobs.plan_report import show
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_checks import checked_config
from jobs.recipe_checks_tune import Search
from jobs.submission.room import check_room, files_elsewhere, machine_at
from jobs.submission.watch import say


def run_at(recipe: Recipe, address: str, search: Search | None = None) -> int:
    """Print the plan and whether there is room. Raises ClusterError if there is none, RecipeError as ``plan`` does."""
    jobs = RayJobs(address)
    jobs.version()
    nodes = jobs.nodes()
    show(plan_at(recipe, jobs, nodes, search))
    say("cluster", check_room(recipe, nodes, jobs))
    return 0


def plan_at(recipe: Recipe, jobs: RayJobs, nodes: list[dict], search: Search | None = None) -> Plan:
    """The plan of a recipe as a job of that cluster; computes only, but for what the cluster says of its GPUs."""
    from jobs.recipe_checks import check

    joined = recipe.cluster.model_copy(update={"address": "auto"})  # so that this machine's GPUs do not count
    recipe = recipe.model_copy(update={"cluster": joined})
    warnings = []
    if elsewhere := files_elsewhere(recipe):
        warnings.append(f"not checked, as it is not on this machine: {', '.join(elsewhere)}")
        if recipe.model.entropy_model is not None:
            raise RecipeError(
                f"model.entropy_model={recipe.model.entropy_model} is not on this machine, and the model's size "
                "follows from it; bring a copy here, or submit without a plan"
            )
    else:
        check(recipe)
    config = checked_config(recipe)
    return make_plan(recipe, config, model_size(config), machine_at(jobs, nodes), None, warnings, search)
