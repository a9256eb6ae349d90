"""What a rollout actor does: hold a copy of the policy at a numbered version, sample from it, and say how likely the
reference finds what it sampled.

Weights come as one buffer in the object store, which every actor of a node maps without a copy of its own.

# B trajectories, S tokens of a row, C completion tokens
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from cluster.errors import ClusterError
from cluster.weights import PackedWeights, fetch, unpack
from jobs.evaluation_tasks import held_out_accuracy
from jobs.recipe import Recipe
from jobs.rl.messages import Evaluated, Loaded, Probe, Request, Sampled, Trajectory
from jobs.rl.policy_source import REFERENCE
from jobs.task_source import load_recipe_tasks
from mmada.actor_critic import ActorCritic
from mmada.data import load_tokenizer
from mmada.data.task_rows import pad_right, padding_id
from mmada.generate import Completion, SamplingSettings, generate_batch, score_cached
from mmada.model import MMaDAForCausalLM

_FETCH_TIMEOUT_S = 60.0
_ROWS_AT_ONCE = 64  # of the reference's forward pass


class RolloutWorker:
    """An actor's content; every method is one call of the pool."""

    def __init__(self, recipe: dict[str, Any], run_dir: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.recipe = Recipe.model_validate(recipe)
        settings = self.recipe.ppo
        assert settings is not None
        self.settings = settings
        self.tokenizer = load_tokenizer(self.recipe.data.tokenizer)
        self.device = torch.device("cuda" if settings.rollout_gpus else "cpu")
        self.dtype = torch.bfloat16 if self.recipe.train.precision == "bf16" else torch.float32
        folder = Path(run_dir) / REFERENCE
        self.policy = self._load(folder)
        self.reference = ActorCritic(self._load(folder), "none") if settings.kl_coefficient else None
        self.generation: int | None = None
        self.version: int | None = None

    def _load(self, folder: Path) -> MMaDAForCausalLM:
        attention = self.recipe.model.attn_implementation
        model = MMaDAForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def load(self, generation: int, version: int, refs: list[Any], probe: Probe | None) -> Loaded:
        """Take up what learners of a generation published. Where it is lost or damaged, the actor keeps what it has of
        theirs."""
        if generation != self.generation:  # what replaced learners called a version is no version of these
            self.generation, self.version = generation, None
        try:
            packed = fetch(refs[0], _FETCH_TIMEOUT_S, version)
            return Loaded(generation, None if packed is None else self.take_up(version, packed, probe))
        except ClusterError as error:
            return Loaded(generation, problem=str(error))

    def take_up(self, version: int, packed: PackedWeights, probe: Probe | None) -> float | None:
        """``load`` of weights that are here and whole; the gap."""
        tensors = unpack(packed)
        if self.device.type != "cpu":
            tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        # assign: the parameters become views of the buffer, so that the actors of a node share one copy.
        missing, unknown = self.policy.load_state_dict(tensors, strict=False, assign=True)
        self.policy.tie_weights()
        absent = set(missing) - set(self.policy.all_tied_weights_keys)
        assert not absent and not unknown, f"weights lack {absent} and have {unknown}"
        self.policy.requires_grad_(False)
        self.version = version
        return self._gap(probe) if probe is not None else None

    def _gap(self, probe: Probe) -> float:
        found = score_cached(
            self.policy, probe.prompts, probe.completions, self.settings.temperature, self.settings.rollout_slots
        )
        pairs = zip(found, probe.logprobs, strict=True)
        return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))

    def sample(self, requests: list[Request], oldest_version: int) -> Sampled:
        """Complete every prompt as often as it has seeds, with a policy that is not older than that version."""
        if self.version is None or self.version < oldest_version:
            return Sampled(None)
        started = time.perf_counter()
        settings = SamplingSettings(self.settings.max_new_tokens, temperature=self.settings.temperature)
        completions = generate_batch(
            self.policy,
            [request.prompt for request in requests],
            settings,
            seeds=[request.seeds for request in requests],
            slots=self.settings.rollout_slots,
            tokenizer=self.tokenizer,
        )
        sampled = time.perf_counter()
        trajectories = [
            Trajectory(
                request.iteration,
                request.slot,
                sample,
                self.version,
                request.prompt,
                completion,
                self.text(completion),
                [],
            )
            for request, samples in zip(requests, completions, strict=True)
            for sample, completion in enumerate(samples)
        ]
        if self.reference is not None:
            for first in range(0, len(trajectories), _ROWS_AT_ONCE):
                self._refer(trajectories[first : first + _ROWS_AT_ONCE])
        return Sampled(trajectories, sampled - started, time.perf_counter() - sampled)

    @torch.no_grad()
    def _refer(self, trajectories: list[Trajectory]) -> None:
        """Fill in the reference's log-probabilities."""
        assert self.reference is not None
        rows = [[*each.prompt, *each.completion.ids] for each in trajectories]
        length = max(map(len, rows))
        output = self.reference(
            pad_right(rows, length, padding_id(self.tokenizer)).to(self.device),
            pad_right([[1] * len(row) for row in rows], length, 0).to(self.device),
            torch.tensor([len(each.prompt) for each in trajectories], device=self.device),
            max(len(each.completion.ids) for each in trajectories),
            self.settings.temperature,
        )
        for each, logprobs in zip(trajectories, output.logprobs_BC.tolist(), strict=True):
            each.reference_logprobs = logprobs[: len(each.completion.ids)]

    def evaluate(self, indices: list[int], version: int) -> Evaluated:
        """Answer held-out problems with that version of the policy."""
        if self.version != version:
            return Evaluated(self.version, [])
        tasks = load_recipe_tasks(self.recipe)
        result = held_out_accuracy(
            self.policy,
            self.tokenizer,
            tasks,
            max_new_tokens=self.settings.max_new_tokens,
            slots=self.settings.rollout_slots,
            items=[tasks.held_out[index] for index in indices],
        )
        answers = [(index, answer.accuracy == 1) for index, answer in zip(indices, result.answers, strict=True)]
        return Evaluated(version, answers)

    def text(self, completion: Completion) -> str:
        """The text of a completion, its end token left out."""
        return self.tokenizer.decode(completion.ids, skip_special_tokens=True)
