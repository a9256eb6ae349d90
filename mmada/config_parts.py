"""The settings of the optional parts of a model, a section each; ``MMaDAConfig`` holds one of every kind.

A section says how its part is built; whether it is built at all says ``MMaDAConfig.mixer_types`` (and
``patches.mode`` for byte patches). A section of a part that is not built changes nothing.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

SSM_FORMS = ("ssd", "selective_scan")
ATTENTION_KINDS = ("attention", "window", "multiscale", "sparse")
ENTROPY_MODES = ("entropy", "monotonic", "combined")


def at_least(section: str, part: Any, smallest: float, *names: str) -> None:
    """Raise ValueError unless each named field is ``smallest`` or more."""
    for name in names:
        value = getattr(part, name)
        if value < smallest:
            raise ValueError(f"{section}.{name}={value} is too small; use {smallest} or more")


def one_of(section: str, part: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the named field is one of ``allowed``."""
    value = getattr(part, name)
    if value not in allowed:
        raise ValueError(f"{section}.{name}={value!r} is unknown; use one of {', '.join(allowed)}")


@strict
@dataclass
class SSMSettings:
    """State-space layers (Mamba, arXiv:2312.00752; Mamba-2, arXiv:2405.21060).

    ``form``: ``"ssd"`` (one decay per head, chunked matrix form) or ``"selective_scan"`` (one per channel and state).
    ``state_size``: numbers kept per channel; default 64 of ssd, 16 of selective_scan.
    ``expand``: inner width over hidden_size. ``conv_kernel``: tokens that the short convolution sees.
    ``head_dim``: width of the heads of ssd; ``num_groups``: groups of them that share what is written and read.
    ``chunk_size``: tokens that ssd takes at once; only the time depends on it.
    ``time_step_min``, ``time_step_max``, ``time_step_floor``: range of the step size at the start.
    """

    form: str = "ssd"
    state_size: int | None = None
    expand: float | int = 2
    head_dim: int = 32
    num_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 32
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4

    def __post_init__(self) -> None:
        if self.state_size is None:
            self.state_size = 16 if self.form == "selective_scan" else 64

    def check(self, config: Any) -> None:
        one_of("ssm", self, "form", SSM_FORMS)
        at_least("ssm", self, 1, "state_size", "head_dim", "num_groups", "conv_kernel", "chunk_size")
        inner = self.inner_size(config)
        if inner < 1:
            raise ValueError(f"ssm.expand={self.expand} leaves no width; use 2, say")
        if self.form == "ssd" and (inner % self.head_dim or (inner // self.head_dim) % self.num_groups):
            raise ValueError(
                f"ssm.head_dim={self.head_dim} and ssm.num_groups={self.num_groups} do not divide the inner width "
                f"{inner} (hidden_size times ssm.expand); use a head_dim that does, and num_groups=1"
            )
        if not 0 < self.time_step_min < self.time_step_max:
            raise ValueError(
                f"ssm.time_step_min={self.time_step_min} is not between 0 and ssm.time_step_max={self.time_step_max}; "
                "use 0.001 and 0.1"
            )
        if not 0 < self.time_step_floor <= self.time_step_max:
            raise ValueError(
                f"ssm.time_step_floor={self.time_step_floor} is not between 0 and "
                f"ssm.time_step_max={self.time_step_max}; use 0.0001"
            )

    def inner_size(self, config: Any) -> int:
        """Width inside the layer."""
        return int(config.hidden_size * self.expand)


@strict
@dataclass
class HybridSettings:
    """Attention and a state space in one layer, joined by a gate, with memory slots.

    ``attention``: the attention branch, a kind of ``mixer_types``. The other branch is built by ``ssm``.
    ``fusion``: ``"residual"`` (attention + tanh(a)·g·(ssm + memory), a zero at the start, so plain attention),
        ``"source"`` ((1 - g)·attention + g·(ssm + memory) with ``gate_bias``), or ``"routed"`` (each token takes one
        branch, the other is not computed for it).
    ``memory_slots``: slots of the memory that is read, written and erased; 0 for none.
    ``memory_chunk_size``: tokens that read and address the slots as they were before the first of them.
    ``slot_allocation``: tokens may write to the slot that is used least, wherever their key points.
    ``gate_bias``: of the gate at the start; of a ``"routed"`` layer's preference for the state space.
    """

    attention: str = "attention"
    fusion: str = "residual"
    memory_slots: int = 32
    memory_chunk_size: int = 16
    slot_allocation: bool = False
    gate_bias: float | int = -0.3

    def check(self, config: Any) -> None:
        one_of("hybrid", self, "attention", ATTENTION_KINDS)
        one_of("hybrid", self, "fusion", ("residual", "source", "routed"))
        at_least("hybrid", self, 0, "memory_slots")
        at_least("hybrid", self, 1, "memory_chunk_size")


@strict
@dataclass
class MemorySettings:
    """Neural memory that learns while it reads (Titans, arXiv:2501.00663).

    ``depth``: layers of the memory (1: a matrix). ``expansion``: hidden width of a deeper one over ``head_dim``.
    ``activation``: between its layers, ``"gelu"`` or ``"silu"``.
    ``num_heads``, ``head_dim``: memories side by side. ``chunk_size``: tokens whose gradients are taken at the same
        weights. ``momentum``, ``forgetting``, ``convolution``: switch these parts.
    ``conv_kernel``: tokens of the convolution after query, key and value.
    ``max_step``: largest θ. ``max_gradient_norm``: a token's gradient is shrunk smoothly to stay below; null: never,
        and a memory whose surprise grows with its weights may then diverge.
    ``gate``: ``"continuous"``, ``"hard"`` or ``"soft"`` update by surprise over ``surprise_threshold``
        (``surprise_temperature`` for soft).
    ``num_persistent_tokens``: learned tokens before the sequence, and before each segment of ``memory_context``.
    ``segment_size``: tokens of such a segment; a chunk ends where its segment does.
    ``attention``: the attention of ``memory_gate`` and ``memory_layer``, a kind of ``mixer_types``.
    """

    depth: int = 2
    expansion: int = 2
    activation: str = "gelu"
    num_heads: int = 4
    head_dim: int = 64
    chunk_size: int = 16
    momentum: bool = True
    forgetting: bool = True
    convolution: bool = True
    conv_kernel: int = 4
    max_step: float | int = 0.3
    max_gradient_norm: float | int | None = 2.0
    gate: str = "continuous"
    surprise_threshold: float | int = 0.0
    surprise_temperature: float | int = 1.0
    num_persistent_tokens: int = 4
    segment_size: int = 64
    attention: str = "window"

    def check(self, config: Any) -> None:
        at_least("memory", self, 1, "depth", "expansion", "num_heads", "head_dim", "chunk_size", "conv_kernel",
                 "segment_size")  # fmt: skip
        at_least("memory", self, 0, "num_persistent_tokens", "surprise_threshold")
        one_of("memory", self, "activation", ("gelu", "silu"))
        one_of("memory", self, "gate", ("continuous", "hard", "soft"))
        one_of("memory", self, "attention", ATTENTION_KINDS)
        for name, remedy in (("max_step", "0.3"), ("surprise_temperature", "1"), ("max_gradient_norm", "2 or null")):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"memory.{name}={value} is not positive; use {remedy}, say")


@strict
@dataclass
class PatchSettings:
    """Bytes grouped into patches before the stack of blocks (BLT, arXiv:2412.09871). Patches are the blocks' tokens.

    ``mode``: ``"none"`` (plain tokens), ``"static"`` (every ``size`` bytes), ``"space"`` (at ends of words), or by
        the entropy in nats of the next byte under a small byte model: ``"entropy"`` (above ``threshold``),
        ``"monotonic"`` (a rise above ``threshold``), ``"combined"`` (a rise above ``threshold_add`` to an entropy
        above ``threshold``). ``max_size``: longest patch, 0 for any.
    ``threshold``: null in a recipe finds the one that gives ``size`` bytes per patch on a sample of its training text.
    ``entropy_model``: the config of that small model, an ``MMaDAConfig`` as a dictionary. A recipe fills it in from
        the folder ``model.entropy_model``.
    ``local_size``, ``encoder_layers``, ``decoder_layers``, ``local_heads``, ``local_window``: the byte-level
        transformers on both sides. ``cross_attention_k``: vectors per patch, so hidden_size = k · local_size.
    ``doubled_residual``: cross-attention adds its input twice, as the paper's code and transformers do.
    ``hash_sizes``, ``hash_vocab``: lengths and table size of the hashed byte n-grams; an empty list for none.
    """

    mode: str = "none"
    size: float | int = 4
    threshold: float | int | None = 1.335442066192627
    threshold_add: float | int = 0.5
    max_size: int = 0
    entropy_model: dict[str, Any] | None = None
    local_size: int = 64
    encoder_layers: int = 1
    decoder_layers: int = 2
    local_heads: int = 2
    local_window: int = 128
    cross_attention_k: int = 2
    doubled_residual: bool = False
    hash_sizes: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 7, 8])
    hash_vocab: int = 5003

    def check(self, config: Any) -> None:
        one_of("patches", self, "mode", ("none", "static", "space", *ENTROPY_MODES))
        at_least("patches", self, 1, "size", "local_size", "encoder_layers", "decoder_layers", "local_heads",
                 "local_window", "cross_attention_k", "hash_vocab")  # fmt: skip
        at_least("patches", self, 0, "max_size")
        if self.mode == "static" and self.size != int(self.size):
            raise ValueError(f"patches.size={self.size} is no whole number; patches.mode=static needs one")
        if self.local_size % (2 * self.local_heads):
            raise ValueError(
                f"patches.local_heads={self.local_heads} does not cut patches.local_size={self.local_size} into heads "
                f"of an even width; use a divisor of {self.local_size // 2}"
            )
        if config.hidden_size != self.cross_attention_k * self.local_size:
            raise ValueError(
                f"patches.local_size={self.local_size} times patches.cross_attention_k={self.cross_attention_k} is not "
                f"hidden_size={config.hidden_size}; a patch is that many vectors side by side"
            )
        if any(size < 1 for size in self.hash_sizes):
            raise ValueError(f"patches.hash_sizes={self.hash_sizes} holds a size below 1; use 3 to 8, or an empty list")
        if self.needs_entropy_model:
            self._check_entropy_model(config)

    def _check_entropy_model(self, config: Any) -> None:
        if self.entropy_model is None:
            raise ValueError(
                f"patches.entropy_model=null leaves patches.mode={self.mode} nothing to ask; give a small byte "
                "model's config (a recipe: its folder as model.entropy_model), or use mode static or space"
            )
        own = type(config)(**self.entropy_model)
        if own.patches.mode != "none":
            raise ValueError(f"patches.entropy_model.patches.mode={own.patches.mode} is not none; use a plain model")
        if own.vocab_size != config.vocab_size:
            raise ValueError(
                f"patches.entropy_model.vocab_size={own.vocab_size} is not vocab_size={config.vocab_size}; use a "
                "model of the same tokens"
            )

    @property
    def needs_entropy_model(self) -> bool:
        """Whether the rule asks a byte model."""
        return self.mode in ENTROPY_MODES


SECTIONS: dict[str, type] = {
    "ssm": SSMSettings,
    "hybrid": HybridSettings,
    "memory": MemorySettings,
    "patches": PatchSettings,
}


def make_section(name: str, value: Any) -> Any:
    """A section from a dictionary, a section as it is, or one of defaults from None.

    Raises ValueError naming an unknown key with those that there are.
    """
    kind = SECTIONS[name]
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict | None):
        raise ValueError(f"{name}={value!r} is not a section; write its keys below it")
    known = [each.name for each in fields(kind)]
    for key in value or {}:
        if key not in known:
            raise ValueError(f"{name}.{key} is not a field of the model; {name} has {', '.join(known)}")
    try:
        return kind(**(value or {}))
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}".splitlines()[0]) from error


def section_dict(section: Any) -> dict[str, Any]:
    """A section as a plain dictionary."""
    return asdict(section)
