"""What a recipe may say: the sections, their keys, types, ranges and defaults.

Each key's meaning stands under it. Values are taken as they are: ``"5"`` is no number, ``true`` is no number.
What several keys together must fulfil is checked in ``jobs.recipe_checks``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from jobs import recipe_yaml
from jobs.recipe_schema_rl import Positive, PPOSection, RewardSection, Section, TasksSection
from jobs.recipe_schema_stages import ObjectivesSection, SourceSection, StageSection
from jobs.recipe_schema_tune import TuneSection

# What ``train.micro_batch`` says where it is to be found.
AUTO = "auto"
# The resolved recipe's file name in a run's folder.
RESOLVED_RECIPE = "recipe.yaml"

Ratio = Annotated[float, Field(ge=0, le=1)]


class RecipeError(ValueError):
    """A recipe or command that cannot be carried out; the message is one line: field, value, remedy."""


class RunSection(Section):
    """Which run this is and where it lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """The run's folder in ``run.dir`` and its name in MLflow: letters, digits, ``.``, ``_`` and ``-``."""

    dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder that holds the runs, on storage that every worker reaches."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes the initial weights, the order of the data and the routers' noise."""

    resume: bool = False
    """Go on from the newest good checkpoint of ``run.name``. A used name is refused without it."""


class DataSection(Section):
    """What is read and how it becomes tokens."""

    source: Literal["stdlib", "files", "hub", "tasks", "mixture"] = "stdlib"
    """``stdlib``: the text in Python's own standard library; ``files``: text, JSONL or Parquet at ``data.path``;
    ``hub``: a Hugging Face data set named by ``data.path``; ``tasks``: the problems of the section ``tasks``;
    ``mixture``: those of ``data.sources``."""

    sources: Annotated[dict[str, SourceSection], Field(min_length=1)] | None = None
    """Several sources by name, for ``mixture``; ``train.stages`` weighs them."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """A file or folder (``files``), or a data set's name (``hub``)."""

    text_field: Annotated[str, Field(min_length=1)] = "text"
    """Key or column that holds the text, in JSONL, Parquet and hub data sets."""

    split: str | None = None
    """Split of a hub data set; null takes ``train``."""

    config_name: str | None = None
    """Configuration of a hub data set, where it has several."""

    held_out: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    """Share of the documents that is never trained on and measures bits per byte."""

    limit_documents: Annotated[int, Field(ge=2)] | None = None
    """Read no more documents than this; null reads all."""

    tokenizer: Annotated[str, Field(min_length=1)] = "bytes"
    """``bytes``, or the name or folder of a Hugging Face tokenizer."""


class TrainSection(Section):
    """How long, in what batches and with which optimizer the model learns."""

    steps: Positive
    """Optimizer steps of the whole run, counted from its first start; with ``stages`` it is theirs together."""

    stages: Annotated[list[StageSection], Field(min_length=1)] | None = None
    """The run in stages, one after the other; null: all of it is one. A section with ``preset`` stands for a list."""

    objective: Literal["language_model", "reward"] = "language_model"
    """``language_model``: predict text, or the answers of ``data.source=tasks``; ``reward``: tell the better of two
    completions."""

    start_from: Annotated[str, Field(min_length=1)] | None = None
    """Weights to begin with: a run's folder, a checkpoint or a saved model; null begins with fresh ones."""

    global_batch: Positive = 32
    """Rows that all workers together see in one optimizer step."""

    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in one row."""

    micro_batch: Positive | Literal["auto"] | None = None
    """Rows that one worker takes through one backward pass; null: its whole share, without accumulation; ``auto``: as
    many as fit its device in every stage, found by trial before training starts and kept when the run goes on."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` keeps weights and gradients in 16 bits and a 32-bit copy in the optimizer; for GPUs that have it."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What DeepSpeed splits over the workers: 0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters."""

    offload_optimizer: bool = False
    """Keep optimizer states in the host's memory and step there; from ZeRO stage 1 on."""

    gradient_checkpointing: bool = False
    """Keep only the input of each layer and compute the rest anew in the backward pass."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """The highest learning rate, reached after the warm-up."""

    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "adaptive"] = "cosine"
    """How the learning rate goes on behind the warm-up; ``wsd`` stays and falls over the last ``decay_steps``;
    ``adaptive`` falls where evaluations no longer become better, and while gradients are mostly noise."""

    decay_steps: Annotated[int, Field(ge=0)] = 0
    """The last steps of ``schedule: wsd``, over which the learning rate falls."""

    adaptive_decay: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What ``schedule: adaptive`` multiplies the learning rate with on a plateau."""

    adaptive_patience: Positive = 2
    """Evaluations without a better result that make a plateau."""

    adaptive_noise: Annotated[float, Field(gt=0)] | None = None
    """Spread of the gradient's norm over its mean beyond which ``adaptive`` lowers the learning rate in proportion;
    null: noise does not count."""

    learning_rate_factors: dict[str, Annotated[float, Field(gt=0)]] = {}
    """What the learning rate of parts is multiplied with: ``{router: 0.5, memory: 2}``."""

    min_learning_rate_ratio: Ratio = 0.1
    """The schedule ends at this share of ``learning_rate``."""

    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises in a straight line."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decoupled weight decay, on matrices only."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the gradient's mean."""

    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the squared gradient's mean."""

    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's guard against division by zero."""

    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""

    checkpoint_every: Annotated[int, Field(ge=0)] = 200
    """Steps between checkpoints; the last step always leaves one, with 0 it alone."""

    keep_checkpoints: Positive = 2
    """Good checkpoints to keep, the newest first."""

    evaluate_every: Annotated[int, Field(ge=0)] = 200
    """Steps between evaluations on the held-out text; the last step always has one, with 0 it alone."""

    evaluate_rows: Positive | None = None
    """Held-out rows of an evaluation on the way; null takes all, as the last one always does."""


class ClusterSection(Section):
    """Where it runs and on how much."""

    address: Annotated[str, Field(min_length=1)] | None = None
    """Ray's head, ``host:port`` or ``auto``; null starts Ray on this machine for the run alone."""

    workers: Positive = 1
    """Processes that train together, one accelerator each where there are any."""

    expert_parallel: Positive = 1
    """Workers over which one set of experts is split."""

    max_failures: Annotated[int, Field(ge=0)] = 0
    """Deaths of workers, one or a whole node of them, after which the run goes on from its last checkpoint."""

    min_workers: Positive | None = None
    """Fewest workers that it may go on with when the cluster has room for no more; null: no fewer than ``workers``."""

    node_timeout: Annotated[float, Field(ge=0)] = 120.0
    """Seconds to wait for a lost node, or for another in its place, before it goes on with fewer workers or ends."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs that Ray sets aside for a worker."""

    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """GPUs of a worker: 0 or 1."""

    memory_per_worker: Annotated[float, Field(gt=0)] | None = None
    """GiB that one worker's weights, gradients, optimizer and activations may take of its device, to ``mmada plan`` and
    ``train.micro_batch=auto``; the process itself comes on top. null: what is free, on a CPU an even share of it."""

    threads_per_worker: Positive | None = None
    """Threads that torch uses in a worker; null shares the node's cores out among its workers."""

    start_timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds to wait for the cluster and its workers."""

    queue_timeout: Annotated[float, Field(ge=0)] = 0.0
    """Seconds to wait for room on the cluster of ``address``: for machines that its autoscaler brings, or that other
    runs give back; 0 refuses a run that does not fit on what is there."""


class TrackingSection(Section):
    """Where MLflow keeps what a run reports."""

    uri: Annotated[str, Field(min_length=1)] | None = None
    """An MLflow server, ``http://host:port``; null keeps an SQLite store in ``run.dir``."""

    experiment: Annotated[str, Field(min_length=1)] = "mmada"
    """The experiment that holds the run."""


class ModelSection(Section):
    """A named size and whatever differs from it: any field of ``mmada.config.MMaDAConfig``.

    The fields' types, ranges and defaults are the model config's own; ``build_config`` applies them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    preset: Annotated[str, Field(min_length=1)]
    """A name out of ``mmada.presets.PRESETS``."""

    attn_implementation: Literal["sdpa", "eager", "blockwise", "flex_attention"] = "sdpa"
    """Attention kernel: torch's fused one, the plain formula that can return its weights, ours in blocks (memory
    linear in the length), or torch's FlexAttention for GPUs."""

    entropy_model: Annotated[str, Field(min_length=1)] | None = None
    """A trained small model of bytes for ``model.patches.mode`` entropy, monotonic or combined: a run's folder, a
    checkpoint or a saved model, on storage that every worker reaches. The new model keeps it as it is."""

    def overrides(self) -> dict[str, Any]:
        """What the recipe sets beside the preset, attention kernel included: ``build_config``'s keywords."""
        return {"attn_implementation": self.attn_implementation, **(self.model_extra or {})}


class Recipe(Section):
    """One run, said completely."""

    run: RunSection
    model: ModelSection
    data: DataSection = DataSection()
    train: TrainSection
    objectives: ObjectivesSection | None = None
    cluster: ClusterSection = ClusterSection()
    tracking: TrackingSection = TrackingSection()
    tasks: TasksSection | None = None
    reward: RewardSection | None = None
    ppo: PPOSection | None = None
    tune: TuneSection | None = None

    @property
    def run_dir(self) -> Path:
        """The run's own folder, ``<run.dir>/<run.name>``."""
        try:
            return Path(self.run.dir).expanduser() / self.run.name
        except RuntimeError as error:
            raise RecipeError(f"run.dir={self.run.dir} names a home that is not there; give another folder") from error

    @property
    def rows_per_worker(self) -> int:
        """Rows of one worker in one optimizer step."""
        return self.train.global_batch // self.cluster.workers

    @property
    def micro_batch(self) -> int:
        """Rows of one worker in one backward pass, with the default filled in."""
        return self.micro_batch_of(self.rows_per_worker)

    def micro_batch_of(self, rows: int) -> int:
        """Of a worker that has so many rows in a step; while ``auto`` has not been found, what it is at most."""
        micro = self.train.micro_batch
        return micro if isinstance(micro, int) else rows

    @property
    def sequences_per_row(self) -> int:
        """Sequences that the model reads for one row: both completions of a pair, or the row itself."""
        return 2 if self.train.objective == "reward" else 1

    @property
    def accumulation(self) -> int:
        """Backward passes of one worker in one optimizer step."""
        return self.rows_per_worker // self.micro_batch

    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections that this recipe has, with every default filled in."""
        return {name: keys for name, keys in self.model_dump().items() if keys is not None}

    def flattened(self) -> dict[str, Any]:
        """Every key with its value, as ``section.key``; what MLflow shows as parameters."""
        return {f"{name}.{key}": value for name, keys in self.sections().items() for key, value in keys.items()}

    def resolved_yaml(self) -> str:
        """The recipe with every default written out; loading it gives the same recipe."""
        return recipe_yaml.dump(self.sections())
