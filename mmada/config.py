"""The one definition of every model setting."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmada.config_attention import check_attention
from mmada.config_parts import SECTIONS, make_section, section_dict
from mmada.layer_pattern import expand_pattern

POSITION_TYPES = ("rope", "alibi", "relative", "none")
MIXER_TYPES = (
    "attention", "window", "multiscale", "sparse", "ssm", "hybrid",
    "memory", "memory_context", "memory_gate", "memory_layer",
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@strict
class MMaDAConfig(PreTrainedConfig):
    """Architecture of an MMaDA model. Settings of a part that is not built change nothing.

    ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``,
        ``head_dim`` (default hidden_size / num_attention_heads), ``intermediate_size``: as in Llama.
    ``mixer_types``: per layer what mixes along the sequence, one of ``MIXER_TYPES``; default attention everywhere.
        ``"ssm,ssm,attention"`` repeats to the number of layers, ``"attention*4"`` counts.
    ``mlp_layer_types``: per layer ``"dense"`` or ``"moe"``, in the same forms; default all ``"moe"`` if
        ``num_experts`` else all dense.
    ``hidden_act``: ``"silu"`` (SwiGLU) or ``"gelu_pytorch_tanh"`` (GeGLU), of every feed-forward but routed experts.
    ``position_embedding_type``: ``"rope"``, ``"alibi"``, ``"relative"`` (learned, T5 buckets) or ``"none"``.
    ``relative_attention_num_buckets``, ``relative_attention_max_distance``: as in T5.
    ``rope_parameters``: as in transformers; ``rope_type`` may also be ``"ntk"``, with a ``factor``.
    ``relative_bias_scaling``: ``"after"`` adds the learned bias to the scaled scores, ``"before"`` scales it with them.
    ``sliding_window``: keys that a ``window`` layer sees, the token itself among them.
    ``window_sizes``: of a ``multiscale`` layer, one per group of heads; -1 sees everything.
    ``sparse_block_size``, ``sparse_window_blocks``, ``sparse_global_blocks``, ``sparse_random_blocks``: of ``sparse``.
    ``attn_logit_softcapping``, ``final_logit_softcapping``: c·tanh(x/c) on scores (before any bias) and on logits, as
        in Gemma 2.
    ``qk_norm``: RMSNorm of each query and key head before rotation, as in Gemma 3 and Qwen 3.
    ``attention_normalizer``: ``"softmax"`` or ``"sparsemax"``.
    ``attn_implementation``: the kernel; what each can do beside, and which stands in, is in
        ``mmada.nn.attention.choice``.
    ``ssm``, ``hybrid``, ``memory``, ``patches``: sections for these parts, see ``mmada.config_parts``.
    ``num_experts``, ``num_experts_per_tok``, ``moe_intermediate_size``: size of the mixture of experts.
    ``norm_topk_prob``: weights of the chosen experts are renormalised to sum to one.
    ``num_shared_experts``: experts of the same size that every token goes through, beside the routed ones.
    ``cross_expert_attention``, ``cross_expert_heads``: attention among a token's active experts, before the blend.
    ``router_normalizer``: ``"softmax"`` or ``"sparsemax"``: how logits become the weights of the chosen experts.
    ``embedding_dropout``, ``token_mask_probability``: noise on what goes into the blocks in training: embeddings of
        tokens, or patches of bytes.
    ``router_noise``: learned noise on the router's logits in training (Shazeer 2017), times ``router_noise_scale``.
    ``router_aux_loss_coef``: weight of the Switch balance loss; ``router_z_loss_coef``: of the router z-loss.
    ``router_balance_scope``: what the balance loss counts over: ``"batch"`` (all rows that go through a forward
        pass together, over all workers) or ``"sequence"`` (each row by itself; does not depend on batch splitting).
    ``router_bias_update_rate``: step of the loss-free balancing bias (DeepSeek-V3 uses 1e-3); 0 turns it off.
    """

    model_type = "mmada"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 264
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 512
    mixer_types: str | list[str] | None = None
    mlp_layer_types: str | list[str] | None = None
    hidden_act: str = "silu"
    position_embedding_type: str = "rope"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_scaling: str = "after"
    sliding_window: int = 256
    window_sizes: list[int] | None = None
    sparse_block_size: int = 64
    sparse_window_blocks: int = 3
    sparse_global_blocks: int = 1
    sparse_random_blocks: int = 1
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    qk_norm: bool = False
    attention_normalizer: str = "softmax"
    ssm: Any = None
    hybrid: Any = None
    memory: Any = None
    patches: Any = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    norm_topk_prob: bool = True
    num_shared_experts: int = 0
    cross_expert_attention: bool = False
    cross_expert_heads: int = 8
    router_normalizer: str = "softmax"
    embedding_dropout: float | int = 0.0
    token_mask_probability: float | int = 0.0
    router_noise: bool = True
    router_noise_scale: float | int = 1.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.001
    router_balance_scope: str = "batch"
    router_bias_update_rate: float | int = 0.0
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float | int = 1e-6
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None and isinstance(self.hidden_size, int) and isinstance(self.num_attention_heads, int):
            heads = max(1, self.num_attention_heads)
            if self.hidden_size % heads:
                raise ValueError(
                    f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}; use a number of "
                    "heads that does, or set head_dim"
                )
            self.head_dim = self.hidden_size // heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        layers = int(self.num_hidden_layers)
        self.mixer_types = expand_pattern("mixer_types", self.mixer_types, layers, "attention")
        default = "moe" if self.num_experts else "dense"
        self.mlp_layer_types = expand_pattern("mlp_layer_types", self.mlp_layer_types, layers, default)
        if self.window_sizes is None:
            self.window_sizes = [64, 256, 1024, -1]
        for name in SECTIONS:
            setattr(self, name, make_section(name, getattr(self, name)))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, naming field, value and remedy."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "intermediate_size", "moe_intermediate_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 1 or more")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            divisors = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; use one of {divisors}"
            )
        if self.head_dim % 2 and self.position_embedding_type == "rope":
            raise ValueError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs; use an even one")
        allowed: tuple[str, ...]
        for name, allowed in (("mixer_types", MIXER_TYPES), ("mlp_layer_types", ("dense", "moe"))):
            for kind in getattr(self, name):
                if kind not in allowed:
                    raise ValueError(f"{name} holds {kind!r}; use {', '.join(map(repr, allowed))}")
        for name, allowed in (
            ("position_embedding_type", POSITION_TYPES),
            ("relative_bias_scaling", ("after", "before")),
            ("hidden_act", ACTIVATIONS),
            ("attention_normalizer", ("softmax", "sparsemax")),
            ("router_normalizer", ("softmax", "sparsemax")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}")
        for name in ("embedding_dropout", "token_mask_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1); use 0 for none")
        for name in self.sections_in_use:
            getattr(self, name).check(self)
        self._check_experts()
        for name in ("initializer_range", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 0.02 and 1e-6, say")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}; use 0, say")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is not in [0, 1); use 0 for none")
        check_attention(self)

    def _validate_ntk_rope_parameters(self, rope_parameters: dict[str, Any], ignore_keys: Any = None) -> None:
        """Asked by transformers, which has such a method for each of its own types."""
        self._check_received_keys("ntk", set(rope_parameters), {"rope_type", "rope_theta", "factor"})

    def _check_experts(self) -> None:
        types, heads = self.mlp_layer_types, self.cross_expert_heads
        if self.num_experts < 0:
            raise ValueError(f"num_experts={self.num_experts} is negative; use 0 for a dense model")
        if "moe" in types and self.num_experts == 0:
            raise ValueError("mlp_layer_types has 'moe' layers but num_experts=0; set num_experts or make them 'dense'")
        if "moe" in types and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and num_experts={self.num_experts}; "
                f"use at most {self.num_experts}"
            )
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} is negative; use 0 for none")
        if "moe" in types and self.cross_expert_attention and (heads < 1 or self.hidden_size % heads):
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            raise ValueError(
                f"cross_expert_heads={heads} does not divide hidden_size={self.hidden_size}; use one of {divisors}"
            )
        if self.router_balance_scope not in ("batch", "sequence"):
            raise ValueError(
                f"router_balance_scope={self.router_balance_scope!r} is unknown; use 'batch' or 'sequence'"
            )
        for name in ("router_noise_scale", "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 to turn it off")

    def to_dict(self) -> dict[str, Any]:
        """As transformers' own, the sections as plain dictionaries."""
        values = super().to_dict()
        for name, kind in SECTIONS.items():
            if isinstance(values.get(name), kind):
                values[name] = section_dict(values[name])
        return values

    @property
    def sections_in_use(self) -> list[str]:
        """Names of the sections whose parts are built."""
        kinds = set(self.mixer_types)
        in_use = {
            "ssm": bool(kinds & {"ssm", "hybrid"}),
            "hybrid": "hybrid" in kinds,
            "memory": any(kind.startswith("memory") for kind in kinds),
            "patches": self.patches.mode != "none",
        }
        return [name for name, used in in_use.items() if used]

    @property
    def embedding_size(self) -> int:
        """Width of token embeddings and of what the head reads: that of a byte where bytes are grouped into patches."""
        return self.hidden_size if self.patches.mode == "none" else self.patches.local_size

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward is a mixture of experts."""
        return [index for index, kind in enumerate(self.mlp_layer_types or []) if kind == "moe"]

    @classmethod
    def architecture_fields(cls) -> set[str]:
        """Names that a recipe may set under ``model.``."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(cls)} - inherited | {"attn_implementation"}
