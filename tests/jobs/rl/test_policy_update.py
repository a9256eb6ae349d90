"""Learning on several workers is learning in one plain loop, whatever splits the work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.engine_settings import policy_settings
from jobs.model_building import build_model
from jobs.recipe import Recipe
from jobs.rl.experience import Experience
from jobs.rl.policy_update import PolicyUpdate, learning_rate_at, num_epochs
from mmada.actor_critic import ActorCritic
from mmada.training.advantages import whiten
from mmada.training.algorithms import (
    ALGORITHMS,
    Advantages,
    AdvantageSettings,
    Counts,
    LossSettings,
    PolicyBatch,
    ScoredBatch,
)
from tests.jobs.rl.experiences import make_experience, small_recipe
from tests.jobs.workers import run_together

ITERATIONS = 2
PPO = {"ppo.minibatch": 8, "ppo.max_new_tokens": 6, "ppo.entropy_coefficient": 0.01, "ppo.value_coefficient": 0.5}
KINDS: dict[str, dict[str, Any]] = {
    "ppo, critic on the policy's layers": PPO,
    "ppo, critic of its own, adaptive price, rewards whitened": PPO
    | {
        "ppo.value_network": "separate",
        "ppo.value_learning_rate_factor": 3.0,
        "ppo.kl_target": 0.5,
        "ppo.kl_horizon": 20,
        "ppo.whiten_rewards": True,
        "ppo.missing_end_penalty": 0.5,
    },
    "grpo, two epochs": {"ppo.algorithm": "grpo", "ppo.minibatch": 8, "ppo.epochs": 2},
    "reinforce": {"ppo.algorithm": "reinforce", "ppo.prompts_per_iteration": 8},
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "two workers": {"train.zero_stage": 0, "cluster.expert_parallel": 1},
    "ZeRO 1, micro batches": {"train.zero_stage": 1, "cluster.expert_parallel": 1, "ppo.micro_batch": 2},
    "ZeRO 2, experts split": {"train.zero_stage": 2, "ppo.micro_batch": 1},
    "ZeRO 3, recomputed": {"train.zero_stage": 3, "train.gradient_checkpointing": True},
}


def build(recipe: Recipe) -> ActorCritic:
    assert recipe.ppo is not None
    critic = recipe.ppo.value_network if ALGORITHMS[recipe.ppo.algorithm].needs_values else "none"
    model = ActorCritic(build_model(recipe), critic)
    if recipe.train.gradient_checkpointing:
        model.recompute_activations()
    return model


def batches(recipe: Recipe) -> list[Experience]:
    """Of both iterations, recorded by the policy as it is at first; one row fewer than whole groups."""
    model = build(recipe)
    return [make_experience(model, iteration) for iteration in range(ITERATIONS)]


def learned(rank: int, recipes: dict[str, Recipe]) -> dict[str, tuple[list[dict[str, float]], np.ndarray]]:
    """By recipe: the metrics of every iteration, and what the policy says of the first batch after them."""
    from cluster.engine import Engine

    found = {}
    for name, recipe in recipes.items():
        model = build(recipe)
        update = PolicyUpdate(recipe, Engine(model, policy_settings(recipe, model)), torch.device("cpu"))
        experience = batches(recipe)
        metrics = [update.learn(iteration, batch) for iteration, batch in enumerate(experience)]
        found[name] = metrics, update.judge(experience[0]).logprobs_BC.numpy()
    return found


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    keys = {"ppo.iterations": 6, "ppo.learning_rate": 8.0, "ppo.min_learning_rate_ratio": 0.5}
    plain = small_recipe(Path("runs"), **keys).ppo
    assert plain is not None
    ppo = plain.model_copy(update={"warmup_iterations": 2})
    assert [learning_rate_at(ppo, i) for i in range(7)] == [4, 8, 8, 7, 6, 5, 4]
    assert [learning_rate_at(plain, i) for i in (0, 3, 6)] == [8, 6, 4]
    only_rising = ppo.model_copy(update={"warmup_iterations": 6})
    assert [learning_rate_at(only_rising, i) for i in (2, 5)] == [4, 8]


class PlainLoop:
    """Learning without engine, workers or micro batches."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.ppo is not None
        self.seed, self.ppo, self.train = recipe.run.seed, recipe.ppo, recipe.train
        self.model, self.algorithm = build(recipe), ALGORITHMS[recipe.ppo.algorithm]
        self.coefficient = recipe.ppo.kl_coefficient
        betas = (recipe.train.beta1, recipe.train.beta2)
        critic = [p for name, p in self.model.named_parameters() if not name.startswith("policy.")]
        groups = [{"params": self.model.policy.parameters(), "factor": 1.0}]
        if critic:
            groups.append({"params": critic, "factor": recipe.ppo.value_learning_rate_factor})
        self.optimizer = torch.optim.AdamW(groups, lr=0, betas=betas, eps=recipe.ppo.adam_epsilon, weight_decay=0)

    def judge(self, batch: Experience, rows: np.ndarray) -> Any:
        lengths = torch.from_numpy((batch.prompt_lengths_N + batch.completion_lengths_N)[rows])
        ids = torch.from_numpy(batch.input_ids_NS[rows])
        return self.model(
            ids,
            (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            torch.from_numpy(batch.prompt_lengths_N[rows]),
            batch.logprobs_NC.shape[1],
            self.ppo.temperature,
        )

    def learn(self, iteration: int, batch: Experience) -> tuple[float, float]:
        """Mean loss and gradient norm of an iteration."""
        ppo, everything = self.ppo, np.arange(len(batch))
        with torch.no_grad():
            values = self.judge(batch, everything).values_BC
        scored = ScoredBatch(
            torch.from_numpy(batch.scores_N).float(),
            torch.arange(batch.logprobs_NC.shape[1]) < torch.from_numpy(batch.completion_lengths_N)[:, None],
            torch.from_numpy(batch.logprobs_NC),
            torch.from_numpy(batch.reference_logprobs_NC),
            values,
            torch.from_numpy(batch.groups_N),
            torch.from_numpy(batch.is_ended_N),
        )
        settings = AdvantageSettings(
            ppo.gamma, ppo.gae_lambda, ppo.kl_estimator, ppo.whiten_rewards, ppo.missing_end_penalty
        )
        advantages = self.algorithm.advantages(scored, settings, self.coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * ppo.learning_rate * (1 - iteration / ppo.iterations)
        steps = []
        for epoch in range(num_epochs(ppo)):
            order = np.random.default_rng([self.seed, iteration, epoch]).permutation(len(batch))
            count = -(-len(batch) // ppo.minibatch)
            for rows in [everything] if self.algorithm.single_update else np.array_split(order, count):
                steps.append(self.step(batch, scored, advantages, rows))
        if ppo.kl_target is not None:
            error = min(max(float(advantages.kl_B.mean()) / ppo.kl_target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * len(batch) / ppo.kl_horizon
        loss, norm = np.mean(steps, axis=0)
        return float(loss), float(norm)

    def step(self, batch: Experience, scored: ScoredBatch, advantages: Advantages, rows: np.ndarray) -> Any:
        """Loss and gradient norm of one optimizer step."""
        ppo, mask = self.ppo, scored.mask_BT
        output, own = self.judge(batch, rows), advantages.advantages_BT[rows]
        returns, values, reference = advantages.returns_BT, scored.values_BT, scored.reference_logprobs_BT
        assert reference is not None
        parts = self.algorithm.loss(
            PolicyBatch(
                output.logprobs_BC,
                scored.logprobs_BT[rows],
                whiten(own, mask[rows]) if self.algorithm.whitens_advantages else own,
                mask[rows],
                reference[rows],
                None if returns is None else returns[rows],
                output.values_BC,
                None if values is None else values[rows],
                output.entropy_BC,
            ),
            LossSettings(
                ppo.clip_epsilon,
                ppo.value_clip_epsilon,
                ppo.value_coefficient,
                ppo.entropy_coefficient,
                self.coefficient,
                ppo.max_new_tokens,
            ),
            Counts.of(mask[rows]),
        )
        self.optimizer.zero_grad()
        parts.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_grad_norm))
        self.optimizer.step()
        return float(parts.total.detach()), norm


def plainly(recipe: Recipe) -> tuple[list[tuple[float, float]], torch.Tensor]:
    """Mean loss and gradient norm of every iteration, and what the policy then says of the first batch."""
    loop, experience = PlainLoop(recipe), batches(recipe)
    curve = [loop.learn(iteration, batch) for iteration, batch in enumerate(experience)]
    with torch.no_grad():
        return curve, loop.judge(experience[0], np.arange(len(experience[0]))).logprobs_BC


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Recipe]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        (kind, topology): small_recipe(folder, **own, **split)
        for kind, own in KINDS.items()
        for topology, split in TOPOLOGIES.items()
    }


@pytest.fixture(scope="module")
def together(recipes) -> list[dict[Any, Any]]:
    """What two workers learned, by rank."""
    return run_together(2, learned, recipes)


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_learn_what_a_plain_loop_learns(kind: str, recipes, together):
    for topology in TOPOLOGIES:
        curve, logprobs = plainly(recipes[kind, topology])
        found, after = together[0][kind, topology]
        for iteration, (loss, norm) in enumerate(curve):
            assert math.isclose(found[iteration]["loss"], loss, rel_tol=2e-5, abs_tol=2e-6), (topology, iteration)
            assert math.isclose(found[iteration]["gradient_norm"], norm, rel_tol=2e-4), (topology, iteration)
        mask = batches(recipes[kind, topology])[0].logprobs_NC != 0
        assert np.abs(after - logprobs.numpy())[mask].max() < 2e-5, topology


def without_reference(rank: int, recipe: Recipe) -> dict[str, float]:
    from cluster.engine import Engine

    model = ActorCritic(build_model(recipe), "shared")
    update = PolicyUpdate(recipe, Engine(model, policy_settings(recipe, model)), torch.device("cpu"))
    batch = make_experience(model, 0)
    batch.reference_logprobs_NC = None
    return update.learn(0, batch)


def test_what_was_compared_with_nothing_is_not_reported(tmp_path: Path):
    one = {"cluster.workers": 1, "cluster.expert_parallel": 1, "train.zero_stage": 1}
    (metrics,) = run_together(1, without_reference, small_recipe(tmp_path, **PPO, **one, **{"ppo.kl_coefficient": 0}))
    assert "policy_loss" in metrics and not {"kl", "reference_kl", "kl_coefficient"} & metrics.keys()


def test_both_workers_report_the_same(together):
    for key, (metrics, _) in together[0].items():
        assert metrics == together[1][key][0]


def test_the_gap_is_of_the_policy_that_sampled(recipes, together):
    for (kind, topology), (metrics, _) in together[0].items():
        assert metrics[0]["logprob_gap"] < 1e-5, (kind, topology)
        # The second batch says that it was sampled by version 1, and was by version 0.
        assert metrics[1]["logprob_gap"] > 1e-3, (kind, topology)
