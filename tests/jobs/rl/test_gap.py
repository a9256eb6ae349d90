"""Learners and rollout actors think the same of the same tokens, whatever the model is made of, or it is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.weights import pack
from jobs.engine_settings import policy_settings
from jobs.recipe import Recipe
from jobs.rl.experience import Experience, collect
from jobs.rl.logprob_gap import max_logprob_gap
from jobs.rl.messages import Request
from jobs.rl.policy_source import REFERENCE
from jobs.rl.policy_update import PolicyUpdate
from jobs.rl.rollout_loop import sample_seeds
from jobs.rl.rollout_worker import RolloutWorker
from mmada.actor_critic import POLICY, ActorCritic
from mmada.tokenizer import ByteTokenizer
from tests.jobs.rl.experiences import small_recipe
from tests.jobs.workers import run_together
from tests.mmada.mixtures import MIXTURES, make_mixture

PROMPTS = ["1 + 2 = ", "What is 13 - 4?", "7", "Say it twice: ab "]
ITERATIONS = 3


def sampled(actor: RolloutWorker, tokenizer: ByteTokenizer, iteration: int) -> Experience:
    """A batch that the actor samples, worth more the more digits it has."""
    seeds = sample_seeds(3, iteration, len(PROMPTS), 2)
    requests = [
        Request(iteration, slot, tokenizer(text)["input_ids"], seeds[slot].tolist())
        for slot, text in enumerate(PROMPTS)
    ]
    trajectories = actor.sample(requests, oldest_version=0).trajectories
    assert trajectories is not None
    scored = [(each, float(sum(c.isdigit() for c in each.text))) for each in trajectories]
    return collect(iteration, 1, scored, padding=0, metrics={})


def gaps(rank: int, recipe: Recipe, names: list[str], run_dir: Path) -> dict[str, list[float]]:
    """By mixture: the gaps of every batch and of every publication's probe."""
    from cluster.engine import Engine

    found = {}
    tokenizer = ByteTokenizer()
    for name in names:
        folder = run_dir / name
        model = ActorCritic(make_mixture(name, torch.float32), "shared")
        model.policy.save_pretrained(folder / REFERENCE)
        actor = RolloutWorker(recipe.model_dump(), str(folder), threads=1)
        update = PolicyUpdate(recipe, Engine(model, policy_settings(recipe, model)), torch.device("cpu"))
        found[name] = []
        probe = None
        for iteration in range(ITERATIONS):
            named = [(key.removeprefix(POLICY), each) for key, each in update.engine.named_full_tensors()]
            packed = pack([(key, each) for key, each in named if not key.startswith("value_head")], iteration)
            gap = actor.take_up(iteration, packed, probe)
            found[name] += [] if gap is None else [gap]
            batch = sampled(actor, tokenizer, iteration)
            assert batch.reference_logprobs_NC is not None
            metrics = update.learn(iteration, batch)
            found[name].append(metrics["logprob_gap"])
            if iteration == 0:  # the reference is the policy that the run begins with
                assert np.abs(batch.reference_logprobs_NC - batch.logprobs_NC).max() < 1e-5
            probe = update.probe(batch)
    return found


def stale(rank: int, recipe: Recipe, run_dir: Path, sharpness: float) -> tuple[float, float, float]:
    """The gap of a batch whose policy is the learner's, and those that a probe and a batch show when version 0's
    weights are handed over as version 1. ``sharpness``: what all logits are multiplied with."""
    from cluster.engine import Engine

    model = ActorCritic(make_mixture("attention", torch.float32), "shared")
    with torch.no_grad():
        model.policy.model.norm.weight *= sharpness
    model.policy.save_pretrained(run_dir / REFERENCE)
    actor = RolloutWorker(recipe.model_dump(), str(run_dir), threads=1)
    update = PolicyUpdate(recipe, Engine(model, policy_settings(recipe, model)), torch.device("cpu"))
    old = [(key, each.detach().clone()) for key, each in model.policy.named_parameters()]
    actor.take_up(0, pack(old, 0), None)
    batch = sampled(actor, ByteTokenizer(), 0)
    fresh = update.learn(0, batch)["logprob_gap"]
    gap = actor.take_up(1, pack(old, 1), update.probe(batch))
    assert gap is not None
    return fresh, gap, update.learn(1, sampled(actor, ByteTokenizer(), 1))["logprob_gap"]


def recipe_for(folder: Path, **overrides: Any) -> Recipe:
    keys = {"ppo.max_new_tokens": 10, "ppo.minibatch": 4, "ppo.learning_rate": 1e-3, "cluster.workers": 1}
    return small_recipe(folder, **keys, **{"cluster.expert_parallel": 1}, **overrides)


def test_every_mixture_is_sampled_as_it_is_learned(tmp_path: Path):
    (found,) = run_together(1, gaps, recipe_for(tmp_path), MIXTURES, tmp_path)
    assert found.keys() == set(MIXTURES)
    assert {name: each for name, each in found.items() if not max(each) < 1e-5} == {}
    assert all(len(each) == 2 * ITERATIONS - 1 for each in found.values())


def test_stale_weights_are_seen_by_both_comparisons(tmp_path: Path):
    ((fresh, probe, batch),) = run_together(1, stale, recipe_for(tmp_path), tmp_path, 1.0)
    assert fresh < 1e-5 and probe > 1e-3 and batch > 1e-3


def test_rounding_of_a_sharp_policy_is_no_gap_and_its_stale_weights_are(tmp_path: Path):
    """Logits of some dozens, as trained models have, halve the digits that are left behind the point."""
    recipe = recipe_for(tmp_path, **{"ppo.temperature": 0.5})
    ((fresh, probe, batch),) = run_together(1, stale, recipe, tmp_path, 20.0)
    limit = max_logprob_gap(recipe)
    assert fresh < limit / 2 and probe > limit and batch > limit
