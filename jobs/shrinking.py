"""With how many workers a run may go on when nodes are lost, and its recipe for that many. Computes only.

Batches do not depend on the number of workers, so fewer of them change nothing but who reads which rows. Nor does a
worker take more rows through one backward pass than before, which is what its memory was found to hold: more rows make
more passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jobs.micro_batch import candidates, with_micro_batch
from jobs.minibatch import minibatch_size
from jobs.recipe import Recipe, RecipeError
from jobs.recipe_checks import check_batch, divisors
from jobs.recipe_checks_ppo import check_minibatches
from jobs.recipe_checks_stages import check_stages
from jobs.stages import stages_of


def possible_workers(recipe: Recipe, resized: Callable[[Recipe, int], Recipe]) -> tuple[int, ...]:
    """Numbers of workers from ``cluster.min_workers`` to ``cluster.workers`` for which ``resized`` gives a recipe.

    The last is ``cluster.workers``, which the recipe's own checks have passed.
    """
    wanted = recipe.cluster.workers
    fewer = range(recipe.cluster.min_workers or wanted, wanted)
    return (*(workers for workers in fewer if _is_possible(recipe, workers, resized)), wanted)


def training_for(recipe: Recipe, workers: int) -> Recipe:
    """The recipe of ``mmada train`` for fewer workers. Raises RecipeError where its batches do not divide so."""
    if workers == recipe.cluster.workers:
        return recipe
    fewer = _with_workers(recipe, workers)
    check_batch(fewer)
    check_stages(fewer)
    if recipe.train.micro_batch is not None:
        return fewer
    before = min(stage.global_batch for stage in stages_of(recipe, [])) // recipe.cluster.workers
    return with_micro_batch(fewer, _largest(candidates(fewer), before))


def ppo_for(recipe: Recipe, workers: int) -> Recipe:
    """The recipe of ``mmada ppo`` for fewer workers. Raises RecipeError where its minibatches do not divide so."""
    if workers == recipe.cluster.workers:
        return recipe
    fewer, ppo = _with_workers(recipe, workers), recipe.ppo
    assert ppo is not None
    check_minibatches(fewer, ppo)
    if ppo.micro_batch is not None:
        return fewer
    rows = minibatch_size(ppo)
    micro = _largest(divisors(rows // workers), rows // recipe.cluster.workers)
    return fewer.model_copy(update={"ppo": ppo.model_copy(update={"micro_batch": micro})})


def _with_workers(recipe: Recipe, workers: int) -> Recipe:
    """Experts are split over as many workers as divide both their number and what they were split over."""
    changed = {"workers": workers, "expert_parallel": math.gcd(workers, recipe.cluster.expert_parallel)}
    return recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update=changed)})


def _is_possible(recipe: Recipe, workers: int, resized: Callable[[Recipe, int], Recipe]) -> bool:
    try:
        resized(recipe, workers)
    except RecipeError:
        return False
    return True


def _largest(sizes: list[int], limit: int) -> int:
    return max(size for size in sizes if size <= limit)
