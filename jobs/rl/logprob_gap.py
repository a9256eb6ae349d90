"""How far learners and rollout actors may differ in what they think of the same tokens."""

from __future__ import annotations

from jobs.recipe import Recipe

# By train.precision. In fp32 the gap of an ordinary token is about 1e-6; it grows with the logits, and on tokens that a
# sharp policy seldom draws it reaches 1e-4 by rounding alone. Weights that are one update behind differ by far more.
_LIMITS = {"fp32": 1e-3, "bf16": 0.5}


def max_logprob_gap(recipe: Recipe) -> float:
    """The limit that the recipe sets, or what its precision allows; nats of one token."""
    assert recipe.ppo is not None
    return recipe.ppo.max_logprob_gap or _LIMITS[recipe.train.precision]


def gap_message(whose: str, version: int, gap: float, limit: float) -> str:
    """The line with which a run ends whose parts disagree."""
    return (
        f"{whose} log-probabilities at version {version} differ from the learners' by {gap:.2g}, more than "
        f"ppo.max_logprob_gap={limit:g}: stale or damaged weights, or other arithmetic; see the logs, or allow more"
    )
