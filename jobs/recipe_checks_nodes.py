"""What a recipe must hold to go on when nodes of its cluster are lost. Raises RecipeError."""

from __future__ import annotations

from jobs.recipe import Recipe, RecipeError


def check_min_workers(recipe: Recipe) -> None:
    """Going on with fewer workers is allowed only where going on is."""
    cluster = recipe.cluster
    if cluster.min_workers is None or cluster.min_workers == cluster.workers:
        return
    if cluster.min_workers > cluster.workers:
        raise RecipeError(
            f"cluster.min_workers={cluster.min_workers} is more than cluster.workers={cluster.workers}; "
            f"use at most {cluster.workers}, or leave it out"
        )
    if cluster.max_failures == 0:
        raise RecipeError(
            f"cluster.min_workers={cluster.min_workers} has no effect with cluster.max_failures=0, which ends the run "
            "at the first loss; use cluster.max_failures=1 or more"
        )
