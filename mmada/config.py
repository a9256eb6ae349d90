"""The one definition of every model setting."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")  # those of transformers


@strict
class MMaDAConfig(PreTrainedConfig):
    """Architecture of an MMaDA model.

    ``vocab_size``, ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads``,
        ``head_dim`` (default hidden_size / num_attention_heads), ``intermediate_size``: as in Llama.
    ``mlp_layer_types``: per layer ``"dense"`` or ``"moe"``; default all ``"moe"`` if ``num_experts`` else all dense.
    ``num_experts``, ``num_experts_per_tok``, ``moe_intermediate_size``: size of the mixture of experts.
    ``norm_topk_prob``: weights of the chosen experts are renormalised to sum to one.
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
    mlp_layer_types: list[str] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    norm_topk_prob: bool = True
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
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["moe" if self.num_experts else "dense"] * int(self.num_hidden_layers)
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, and rotary positions turn pairs; use an even one")
        types = self.mlp_layer_types
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(types)} entries for num_hidden_layers={self.num_hidden_layers}; "
                "give one per layer"
            )
        for kind in types:
            if kind not in ("dense", "moe"):
                raise ValueError(f"mlp_layer_types holds {kind!r}; use 'dense' or 'moe'")
        if self.num_experts < 0:
            raise ValueError(f"num_experts={self.num_experts} is negative; use 0 for a dense model")
        if "moe" in types and self.num_experts == 0:
            raise ValueError("mlp_layer_types has 'moe' layers but num_experts=0; set num_experts or make them 'dense'")
        if "moe" in types and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is not between 1 and num_experts={self.num_experts}; "
                f"use at most {self.num_experts}"
            )
        if self.router_balance_scope not in ("batch", "sequence"):
            raise ValueError(
                f"router_balance_scope={self.router_balance_scope!r} is unknown; use 'batch' or 'sequence'"
            )
        for name in ("router_noise_scale", "router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 to turn it off")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters.rope_type={rope_type} is unknown; use one of {', '.join(ROPE_TYPES)}")
        theta = (self.rope_parameters or {}).get("rope_theta", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
            raise ValueError(f"rope_parameters.rope_theta={theta} is not a positive number; use 10000.0, say")
        for name in ("initializer_range", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive; use 0.02 and 1e-6, say")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}; use 0, say")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} is not in [0, 1); use 0 for none")

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers whose feed-forward is a mixture of experts."""
        return [index for index, kind in enumerate(self.mlp_layer_types or []) if kind == "moe"]

    @classmethod
    def architecture_fields(cls) -> set[str]:
        """Names that a recipe may set under ``model.``."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(cls)} - inherited | {"attn_implementation"}
