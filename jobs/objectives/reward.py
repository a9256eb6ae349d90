"""Learning a reward from pairs of completions: Bradley–Terry on the total, a proxy for every component.

# N pairs held out or normalised over, B pairs of a micro batch, T tokens, H components
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jobs.entropy_model import settle_saved_threshold
from jobs.model_building import build_model_of
from jobs.objectives.objective import Extra, Objective, Place, StepResult, router_metrics
from jobs.recipe import Recipe
from jobs.studies.intervals import wilson
from jobs.task_source import load_recipe_tasks
from mmada.data import load_tokenizer
from mmada.data.preferences import PairRows, Preferences, preferences_of_tasks, read_preferences
from mmada.plots.learning_curve import curves as figure_of
from mmada.reward_model import COMPONENTS, MMaDARewardModel
from mmada.training.objectives.reward import RewardWeights, reward_losses

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

    from cluster.engine import Engine
    from mmada.pretrained import TrainableModel

NORMALISED_OVER = 1024  # training pairs at most


class Judged(NamedTuple):
    """Of N pairs, the better completion first: rewards, confidences (N, 2), components, proxies (N, 2, H)."""

    reward_N2: Tensor
    confidence_N2: Tensor
    components_N2H: Tensor
    proxies_N2H: Tensor


class RewardObjective(Objective):
    """``train.objective=reward``."""

    held_out_metric = "pair_accuracy"
    rows: PairRows

    @classmethod
    def model_class(cls) -> type[MMaDARewardModel]:
        """The reward model's."""
        return MMaDARewardModel

    def __init__(self, recipe: Recipe) -> None:
        """Raises DataError for data without pairs, or with pairs longer than a row."""
        self.preferences, length = preferences(recipe), recipe.train.sequence_length
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        rows = PairRows(self.preferences.train, tokenizer, length)
        super().__init__(recipe, tokenizer, self.preferences.fingerprint, rows, None)
        self.held_out_rows = PairRows(self.preferences.held_out, tokenizer, length)
        self.weights = RewardWeights()

    @classmethod
    def prepare(cls, recipe: Recipe) -> RewardObjective:
        """Make or read the pairs: nothing is written."""
        return cls(recipe)

    @classmethod
    def open(cls, recipe: Recipe, prepared: Path | None) -> RewardObjective:
        """Make or read the same pairs."""
        return cls(recipe)

    def announcement(self) -> str:
        """In pairs."""
        return f"{len(self.rows):,} pairs of completions to learn from, {len(self.held_out_rows):,} held out"

    def headline(self, value: float) -> str:
        """In per cent."""
        return f"held out {100 * value:.1f} % of pairs"

    def closing(self, metrics: dict[str, float]) -> str:
        """With its interval."""
        low, high = (100 * metrics[f"pair_accuracy_{end}"] for end in ("low", "high"))
        share = f"{100 * metrics['pair_accuracy']:.1f} % of {len(self.held_out_rows):,} held-out pairs ordered rightly"
        return f"{share} (95 % interval {low:.1f} to {high:.1f})"

    def figure(self, curves: dict[str, dict[int, float]], title: str) -> Figure:
        """Ranking loss and held-out accuracy."""
        loss, accuracy = ([*curves.get(name, {}).items()] for name in ("ranking_loss", "pair_accuracy"))
        return figure_of({"ranking loss, nats per pair": loss}, {"held-out pair accuracy": accuracy}, title, "")

    def build_model(self) -> MMaDARewardModel:
        """The reward model."""
        return build_model_of(MMaDARewardModel, self.recipe)

    def settle(self, model: TrainableModel, saved: Path | None) -> list[str]:
        """The threshold of byte patches, from the model that training begins with."""
        return settle_saved_threshold(model, saved)

    def count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pairs, and tokens of both completions with their prompts."""
        return torch.tensor(len(batch["proxies"])), batch["attention_mask"].sum()

    def forward(
        self, engine: Engine, batch: dict[str, Tensor], share: Tensor, extra: Extra | None = None
    ) -> StepResult:
        """Both completions of every pair in one pass."""
        # Each row has a name of its own, as the noise of training hangs on it.
        names_B2 = torch.stack([2 * batch["sample_ids"], 2 * batch["sample_ids"] + 1], dim=1)
        output = engine.forward(**flat_rows(batch), sample_ids=names_B2.flatten())
        losses = reward_losses(*judged(output, batch), self.weights)
        loss = losses.loss / share
        metrics = {
            "loss": loss.detach(),
            "ranking_loss": losses.ranking / share,
            "proxy_loss": losses.proxies / share,
            "confidence_loss": losses.confidence / share,
            "training_pair_accuracy": losses.right / share,
            **router_metrics(output),
        }
        total = loss if output.loss is None else loss + output.loss
        return StepResult(total, metrics, output.expert_load, output.num_patches)

    def evaluate(self, engine: Engine, place: Place, batch_rows: int, max_rows: int | None) -> dict[str, float]:
        """See ``held_out_metrics``."""
        found = judge(engine.forward, self.held_out_rows, place, batch_rows, max_rows)
        return held_out_metrics(found, [pair.kind for pair in self.held_out_rows.pairs])

    def finish(self, engine: Engine, place: Place, batch_rows: int) -> None:
        """Normalise: mean 0 and variance 1 over completions of the training pairs."""
        found = judge(engine.forward, self.rows, place, batch_rows, NORMALISED_OVER)
        model: Any = engine.module
        model.set_normalisation(float(found.reward_N2.mean()), float(found.reward_N2.std(correction=0)))


def preferences(recipe: Recipe) -> Preferences:
    """The pairs that a recipe names: made from its tasks, or read from ``data.path``."""
    data = recipe.data
    if data.source == "tasks":
        return preferences_of_tasks(load_recipe_tasks(recipe), recipe.run.seed)
    assert data.path is not None
    return read_preferences(data.path, data.held_out, data.limit_documents)


def flat_rows(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B, 2, T) as the 2 B rows that the model takes."""
    return {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}


def judged(output: Any, batch: dict[str, Tensor]) -> Judged:
    """The model's output for ``flat_rows`` of a batch, by pairs again."""
    shape = batch["proxies"].shape
    return Judged(
        output.reward.view(shape[:2]),
        output.confidence.view(shape[:2]),
        output.components.view(shape),
        batch["proxies"],
    )


@torch.no_grad()
def judge(forward: Callable[..., Any], rows: PairRows, place: Place, batch_rows: int, max_rows: int | None) -> Judged:
    """What the model says of the first pairs, on every worker the same; in float64.

    Workers take turns and run the same number of passes, the last ones on pairs that count for nothing.
    """
    num_rows, width = min(len(rows), max_rows or len(rows)), len(COMPONENTS)
    found_N = torch.zeros(num_rows, 2, 2 + 2 * width, dtype=torch.float64, device=place.device)
    per_pass = batch_rows * place.world
    for first in range(0, num_rows, per_pass):
        wanted = np.arange(first + place.rank * batch_rows, first + (place.rank + 1) * batch_rows)
        batch = rows.batch(np.minimum(wanted, num_rows - 1))
        batch = {name: value.to(place.device) for name, value in batch.items()}
        said = judged(forward(**flat_rows(batch)), batch)
        own = wanted[wanted < num_rows]
        parts = [said.reward_N2[..., None], said.confidence_N2[..., None], said.components_N2H, said.proxies_N2H]
        found_N[own] = torch.cat(parts, dim=-1)[: len(own)].double()
    found_N = place.sum(found_N).cpu()
    return Judged(found_N[..., 0], found_N[..., 1], found_N[..., 2 : 2 + width], found_N[..., 2 + width :])


def held_out_metrics(found: Judged, kinds: list[str]) -> dict[str, float]:
    """Share of pairs ordered rightly with its 95 % interval, in all and by kind; how well calibrated the confidence is
    (Brier score: mean squared error against having been right); correlation of each component with its proxy, where
    that is known of two completions and varies.
    """
    right_N = found.reward_N2[:, 0] > found.reward_N2[:, 1]
    estimate = wilson(int(right_N.sum()), len(right_N))
    metrics = {
        "pair_accuracy": estimate.mean,
        "pair_accuracy_low": estimate.low,
        "pair_accuracy_high": estimate.high,
        "confidence_brier": float((found.confidence_N2 - right_N[:, None].double()).square().mean()),
    }
    by_kind = defaultdict(list)
    for kind, right in zip(kinds, right_N.tolist(), strict=False):
        by_kind[kind].append(right)
    if len(by_kind) > 1:
        metrics |= {f"pair_accuracy_{kind}": sum(each) / len(each) for kind, each in sorted(by_kind.items())}
    for place, name in enumerate(COMPONENTS):
        said, proxy = found.components_N2H[..., place].flatten(), found.proxies_N2H[..., place].flatten()
        known = ~proxy.isnan()
        if len(proxy[known].unique()) > 1 and len(said[known].unique()) > 1:
            metrics[f"{name}_correlation"] = float(torch.corrcoef(torch.stack([said[known], proxy[known]]))[0, 1])
    return metrics
