"""The sections of a recipe for reinforcement learning: the tasks, what rewards them, and how the policy is improved."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """What every section has in common: unknown keys and wrong types are refused, nothing changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class TasksSection(Section):
    """Problems whose answers can be checked: a task family of the package reasoning-gym, or several."""

    family: Name | Annotated[list[Name], Field(min_length=1)]
    """A family's name, such as ``chain_sum``, or a list of names, whose problems then take turns."""

    difficulty: Annotated[int, Field(ge=0)] | Annotated[list[int], Field(min_length=1)] = 0
    """Levels by which every attribute of the family's own curriculum is raised above its first; or a list of them,
    which then take turns."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Decides which problems there are; same seed, same problems."""

    size: Positive = 2000
    """Problems to learn from."""

    held_out: Positive = 200
    """Further problems that measure accuracy; none of their questions is learned from."""

    config: dict[str, Any] = {}
    """The family's own settings, such as ``{min_terms: 2, max_terms: 2}``, over what ``difficulty`` gives."""

    template: Annotated[str, Field(pattern=r"\{question\}")] = "{question}\n"
    """The prompt, with ``{question}`` where the problem stands."""


class RewardPart(Section):
    """One source of reward."""

    kind: Literal["task", "solved", "function", "model", "http"]
    """``task``: how well the answer solves the problem, by its family's scorer, which may give partial marks;
    ``solved``: 1 for full marks, else 0; ``function``: Python's ``module:function``; ``model``: a learned reward
    model; ``http``: an endpoint."""

    name: Name | None = None
    """``module:function``, a reward model's folder, or a URL; none for ``task`` and ``solved``."""

    weight: float = 1.0
    """Its share in the sum."""


class RewardSection(Section):
    """What a completion is worth: a weighted sum of parts."""

    parts: Annotated[list[RewardPart], Field(min_length=1)] = [RewardPart(kind="task")]
    """A list such as ``[{kind: task}, {kind: function, name: "my_rewards:short", weight: 0.1}]``."""

    timeout: Seconds = 30.0
    """Seconds that one call may take; a reward actor that takes longer is replaced."""

    retries: Annotated[int, Field(ge=0)] = 1
    """Further attempts at a call whose actor died or hung, or whose endpoint gave no answer or an error of its own
    (status 500 and above), before its trajectories are dropped."""

    batch: Positive = 16
    """Completions that one call scores."""


class PPOSection(Section):
    """Reinforcement learning: what is sampled, how it is learned from, and what guards it."""

    algorithm: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce"] = "ppo"
    """``ppo`` learns a value of every token; the others compare the samples of one prompt, or (``reinforce``) all."""

    start_from: Name | None = None
    """The policy to improve, which is also the reference: a run's folder, a checkpoint or a saved model; null begins
    with fresh weights."""

    iterations: Positive
    """Batches to sample and learn from, counted from the run's first start."""

    prompts_per_iteration: Positive = 16
    """Problems in one batch."""

    samples_per_prompt: Positive = 4
    """Completions of each problem in a batch."""

    max_new_tokens: Positive = 32
    """The longest completion, its end token included."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits, in sampling as in learning."""

    epochs: Positive | None = None
    """Passes over a batch; null: 4 for ``ppo``, 1 for the others. ``reinforce`` takes no more."""

    minibatch: Positive = 32
    """Completions of one optimizer step, over all workers."""

    micro_batch: Positive | None = None
    """Completions that one worker takes through one backward pass; null: its whole share of the minibatch."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The policy's highest learning rate."""

    warmup_iterations: Annotated[int, Field(ge=0)] = 0
    """Iterations over which the learning rate rises to it in a straight line: Adam's first steps are large."""

    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """From then on the learning rate falls in a straight line to this share of it."""

    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """AdamW's guard against division by zero."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""

    clip_epsilon: Annotated[float, Field(gt=0)] = 0.2
    """How far the ratio of new to old probability may leave 1 before its gradient stops."""

    value_clip_epsilon: Annotated[float, Field(gt=0)] | None = 0.2
    """How far a new value may leave the old one; null does not clip."""

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a later token's reward."""

    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Generalised advantage estimation's trade of bias (0) for variance (1)."""

    whiten_advantages: bool = True
    """Bring the advantages of each minibatch to mean 0 and variance 1 (``ppo`` only)."""

    whiten_rewards: bool = False
    """Bring the token rewards of each batch to variance 1, without moving their mean (``ppo`` only)."""

    missing_end_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the reward of a completion that did not end by itself."""

    score_clip: Annotated[float, Field(gt=0)] | None = None
    """Largest magnitude of a completion's score; null does not clip."""

    value_network: Literal["shared", "separate"] = "shared"
    """A value head on the policy's own layers, or a network of its own (``ppo`` only)."""

    value_learning_rate_factor: Annotated[float, Field(gt=0)] = 1.0
    """How many times as fast as the policy the critic learns: its head, and its own network where it has one."""

    value_coefficient: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value's squared error in the loss."""

    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the policy's entropy, which it is rewarded for."""

    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Price of moving away from the reference: in each token's reward (``ppo``, ``rloo``, ``reinforce``) or in the
    loss (``grpo``, ``dr_grpo``); 0 asks for no reference."""

    kl_estimator: Literal["k1", "k3"] = "k1"
    """How a token's divergence is estimated where it is a reward; in a loss it is always ``k3``."""

    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Nats per completion that an adaptive ``kl_coefficient`` steers towards; null keeps it fixed."""

    kl_horizon: Positive = 10_000
    """Completions over which the adaptive coefficient answers."""

    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Updates by which the policy that samples may be behind: 0 samples and learns in turns, 1 samples the next batch
    while one is learned, more lets sampling run ahead."""

    rollout_workers: Positive = 1
    """Ray actors that sample, each with a copy of the policy (and of the reference)."""

    rollout_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Logical CPUs that Ray sets aside for each of them."""

    rollout_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each of them, or a share of one."""

    rollout_threads: Positive | None = None
    """Threads that torch uses in each; null shares the node's cores out."""

    rollout_slots: Positive = 64
    """Completions that one of them decodes at a time."""

    rollout_timeout: Seconds = 300.0
    """Seconds after which sampling counts as hung; the actor is replaced and its work done again."""

    reward_workers: Positive = 1
    """Ray actors that score."""

    max_replacements: Annotated[int, Field(ge=0)] = 20
    """How often an actor's place is filled anew, with nothing done by its kind in between, before the run stops."""

    max_reward_failures: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of a batch that may be dropped, because its reward or its sampling failed. Beyond it the run stops."""

    max_logprob_gap: Annotated[float, Field(gt=0)] | None = None
    """How far learners and rollout actors may differ in a token's log-probability before the run stops; null: 1e-3 in
    fp32, 0.5 in bf16."""

    checkpoint_every: Annotated[int, Field(ge=0)] = 10
    """Iterations between checkpoints; the last one always leaves one, with 0 it alone."""

    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Iterations between greedy evaluations on the held-out problems; 0: before the first and after the last alone."""

    table_every: Annotated[int, Field(ge=0)] = 10
    """Iterations between tables of sampled texts; 0 leaves them out."""
