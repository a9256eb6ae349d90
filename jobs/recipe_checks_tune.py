"""What must fit together in a recipe for ``mmada tune``. Nothing here writes to disk; all raises RecipeError.

Every edge of the space is a recipe of its own and is checked as one, so that no trial fails an hour later for what
could have been said at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.recipe import Recipe, RecipeError, recipe_of, set_key
from jobs.recipe_schema_tune import DistributionSection, TuneSection
from jobs.stages import lower_is_better
from jobs.wording import listed, shown, suggestion

if TYPE_CHECKING:
    from cluster.search import Dimension

MAX_GRID = 1000  # combinations
MAX_CORNERS = 200  # recipes looked at
# What trials of one sweep have in common, for the first to be comparable with the last.
COMPARED = frozenset(
    ("train.steps", "train.evaluate_every", "train.evaluate_rows", "ppo.iterations", "ppo.evaluate_every")
)
# What a run may change between two of its steps, and its checkpoint does not hold.
IN_FLIGHT = re.compile(
    r"train\.(learning_rate|min_learning_rate_ratio|clip_grad_norm)"
    r"|objectives\.weights(\.\w+)?"
    r"|train\.stages\.[\w*-]+\.(learning_rate_factor|loss_weights(\.\w+)?|mixture(\.\w+)?)"
)


@dataclass(frozen=True)
class Search:
    """A search that may begin.

    ``values``: what the recipe's file says, with overrides and without its section ``tune``. ``most_steps``: of the
    longest trial. ``trials``: how many.
    """

    recipe: Recipe
    values: dict[str, Any]
    space: Mapping[str, DistributionSection]
    dimensions: dict[str, Dimension]
    metric: str
    mode: str
    trials: int
    grace_period: int
    most_steps: int

    @property
    def settings(self) -> TuneSection:
        """The section ``tune``."""
        assert self.recipe.tune is not None
        return self.recipe.tune

    @property
    def extreme(self) -> str:
        """Which of the metric is looked for."""
        return "least" if self.mode == "min" else "most"

    def values_with(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a recipe's file with these settings would say."""
        return with_settings(self.values, settings)


def with_settings(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with some keys set anew."""
    values = copy.deepcopy(values)
    for key, value in settings.items():
        set_key(values, key, copy.deepcopy(value))
    return values


def check_tune(values: dict[str, Any]) -> Search:
    """The search that these values say, checked with all its edges. Raises RecipeError."""
    from jobs.tuning.space import corners, count_grid, dimensions

    recipe = recipe_of(values)
    if recipe.tune is None:
        raise RecipeError("tune.space is missing; the recipe needs a section tune, as in jobs/recipes/tune.yaml")
    tune = recipe.tune
    own = {name: section for name, section in values.items() if name != "tune"}
    for key, section in tune.space.items():
        check_distribution(f"tune.space.{key}", section)
        check_key(own, key, section)
    is_grid = tune.search == "grid"
    if is_grid:
        trials = check_grid(tune, {key: count_grid(section) for key, section in tune.space.items()})
    else:
        trials = tune.trials or 10
    steps = 0
    for index, settings in enumerate(corners(tune.space)):
        if index == MAX_CORNERS:
            break
        steps = max(steps, check_corner(own, settings, tune.verb, tune.space))
    metric = checked_metric(recipe, tune)
    mode = tune.mode or ("min" if lower_is_better(metric) and "reward" not in metric else "max")
    search = Search(
        recipe=recipe,
        values=own,
        space=tune.space,
        dimensions=dimensions(tune.space, grid=is_grid),
        metric=metric,
        mode=mode,
        trials=trials,
        grace_period=tune.grace_period or max(1, steps // 4),
        most_steps=steps,
    )
    check_scheduler(search)
    return search


def check_distribution(where: str, section: DistributionSection) -> None:
    """It is exactly one, and its numbers make sense."""
    from jobs.tuning.space import DISTRIBUTIONS

    given = [name for name in DISTRIBUTIONS if getattr(section, name) is not None]
    if len(given) != 1:
        found = f"{where} has {listed(given, 'and')}" if given else f"{where} has no distribution"
        raise RecipeError(f"{found}; give exactly one of {listed(DISTRIBUTIONS)}")
    kind = given[0]
    for name in ("total", "step"):
        if getattr(section, name) is not None and kind != "simplex":
            raise RecipeError(f"{where}.{name}={getattr(section, name):g} goes with simplex, not {kind}; leave it out")
    if kind == "choice":
        options = section.choice or []
        if len({shown(option) for option in options}) < len(options):
            raise RecipeError(f"{where}.choice={shown(options)} names a value twice; leave one out")
        return
    if kind == "simplex":
        check_simplex(where, section)
        return
    low, high, *step = getattr(section, kind)
    if low >= high:
        raise RecipeError(f"{where}.{kind}={shown([low, high, *step])} has no room; the first must be below the second")
    if kind == "loguniform" and low <= 0:
        raise RecipeError(f"{where}.loguniform={shown([low, high])} has no logarithm at {low:g}; begin above 0")
    if kind == "quniform":
        if step[0] <= 0:
            raise RecipeError(f"{where}.quniform={shown([low, high, *step])} has no step; give a third number above 0")
        for edge in (low, high):
            if abs(edge / step[0] - round(edge / step[0])) > 1e-9:
                raise RecipeError(
                    f"{where}.quniform={shown([low, high, *step])} has an end that is no multiple of its step; "
                    f"use {round(edge / step[0]) * step[0]:g} instead of {edge:g}"
                )


def check_simplex(where: str, section: DistributionSection) -> None:
    """Its names differ, and its total can be cut into steps for all of them."""
    names, total = section.simplex or [], section.total or 1.0
    if len(set(names)) < len(names):
        raise RecipeError(f"{where}.simplex={shown(names)} has a name twice; leave one out")
    if section.step is None:
        return
    parts = total / section.step
    if abs(parts - round(parts)) > 1e-9 or round(parts) < len(names):
        raise RecipeError(
            f"{where}.step={section.step:g} does not cut total={total:g} into at least {len(names)} equal parts, one "
            f"for each name; use {total / (4 * len(names)):g}, say"
        )


def check_key(values: dict[str, Any], key: str, section: DistributionSection) -> None:
    """It names something that a trial may set."""
    first, _, rest = key.partition(".")
    if first == "tune" or key in ("run.name", "run.dir", "run.resume") or first in ("tracking", "cluster"):
        raise RecipeError(f"tune.space.{key} cannot be searched: it says where and how trials run; leave it out")
    if first not in Recipe.model_fields or not rest:
        raise RecipeError(f"tune.space.{key} is no section.key of a recipe; {suggestion(first, Recipe.model_fields)}")
    if section.simplex is None and "*" in key.split("."):
        raise RecipeError(f"tune.space.{key} holds a *, which is for the names of a simplex; write one name there")
    if key.split(".").count("*") > 1:
        raise RecipeError(f"tune.space.{key} holds * more than once; write one")


def check_grid(tune: TuneSection, counts: dict[str, int | None]) -> int:
    """How many combinations there are, which must be all that are asked for."""
    product = 1
    for key, count in counts.items():
        if count is None:
            raise RecipeError(
                f"tune.search=grid needs an end of values, and tune.space.{key} has none; use choice, randint, "
                "quniform or a simplex with a step there, or tune.search=random"
            )
        product *= count
    if tune.trials is not None and tune.trials != product:
        raise RecipeError(
            f"tune.trials={tune.trials} is not the {product} combinations of tune.search=grid; leave tune.trials out"
        )
    if product > MAX_GRID:
        raise RecipeError(f"tune.search=grid has {product} combinations, more than {MAX_GRID}; use tune.search=random")
    return product


def check_corner(values: dict[str, Any], settings: dict[str, Any], verb: str, space: Mapping[str, Any]) -> int:
    """A recipe at the edge of the space can be run; its steps. Raises RecipeError that names the setting."""
    from cluster.errors import ClusterError
    from jobs.recipe_checks import check
    from jobs.recipe_checks_ppo import check_ppo, completed
    from mmada.errors import DataError

    try:
        recipe = recipe_of(with_settings(values, settings))
        if verb == "ppo":
            recipe = completed(recipe)
            check_ppo(recipe)
            assert recipe.ppo is not None
            return recipe.ppo.iterations
        check(recipe)
    except (RecipeError, DataError, ClusterError) as error:
        text = str(error)
        named = [key for key in settings if text.startswith(key)]
        if not named and any(text.startswith(key.split(".*")[0]) for key in space):
            named = list(settings)
        # What is wrong without the search, too, is no matter of the search.
        raise RecipeError(f"tune.space allows what no run can be: {text}" if named else text) from error
    return recipe.train.steps


def checked_metric(recipe: Recipe, tune: TuneSection) -> str:
    """What the search looks at, which an evaluation measures."""
    if tune.verb == "ppo":
        assert recipe.ppo is not None
        known = ["held_out_accuracy", "reward"]
        metric = tune.metric or known[0]
        if metric in known and metric != "reward" and not recipe.ppo.evaluate_every:
            raise RecipeError(f"tune.metric={metric} is never measured (ppo.evaluate_every=0); set ppo.evaluate_every")
    else:
        from jobs.objectives.registry import objective_class

        kind = objective_class(recipe)
        known, metric = sorted(kind.evaluated(recipe)), tune.metric or kind.held_out_metric
    if metric not in known:
        raise RecipeError(f"tune.metric={metric} is never evaluated; {suggestion(metric, known)}")
    return metric


def check_scheduler(search: Search) -> None:
    """What may stop trials hears of them before they end, and can do with them what it will."""
    tune, recipe = search.settings, search.recipe
    if tune.scheduler == "none":
        if tune.grace_period is not None:
            raise RecipeError(
                f"tune.grace_period={tune.grace_period} goes with a tune.scheduler that stops trials; leave it out"
            )
        return
    if tune.verb == "ppo":
        every = 1 if search.metric == "reward" else (recipe.ppo.evaluate_every if recipe.ppo else 0)
        name = "ppo.evaluate_every"
    else:
        every, name = recipe.train.evaluate_every, "train.evaluate_every"
    if not every or every >= search.most_steps:
        raise RecipeError(
            f"tune.scheduler={tune.scheduler} hears nothing of trials before they end ({name}={every}, "
            f"{search.most_steps} steps); use {name}={max(1, search.most_steps // 8)}, say"
        )
    if search.grace_period >= search.most_steps:
        raise RecipeError(
            f"tune.grace_period={search.grace_period} is as long as the longest trial ({search.most_steps} steps); "
            f"use {max(1, search.most_steps // 4)}, say"
        )
    if tune.scheduler == "pbt":
        check_population(search)


def check_population(search: Search) -> None:
    """Settings can change in flight, and there is a checkpoint wherever trials are compared."""
    tune, train = search.settings, search.recipe.train
    if tune.verb == "ppo":
        raise RecipeError("tune.scheduler=pbt carries checkpoints of `mmada train` only; use asha for tune.verb=ppo")
    if tune.search != "random":
        raise RecipeError(f"tune.scheduler=pbt draws by itself; use tune.search=random instead of {tune.search}")
    if search.trials < 2:
        raise RecipeError(f"tune.trials={search.trials} are no population; use 4, say")
    for key in search.space:
        if not IN_FLIGHT.fullmatch(key):
            raise RecipeError(
                f"tune.space.{key} cannot change while a run goes on, as tune.scheduler=pbt has it; use asha, or "
                "search learning rates, mixtures and weights of losses"
            )
    if not train.checkpoint_every or train.evaluate_every % train.checkpoint_every:
        raise RecipeError(
            f"train.checkpoint_every={train.checkpoint_every} leaves evaluations without a checkpoint to carry, as "
            f"tune.scheduler=pbt needs; use train.checkpoint_every={train.evaluate_every}"
        )
