"""Layers around the neural memory of Titans (arXiv:2501.00663, section 4): alone, beside attention, before it.

``memory`` (LMM): y = M(x̃). ``memory_gate`` (MAG): Attn(x) ⊗ M(x̃). ``memory_layer`` (MAL): Attn(M(x̃)).
``memory_context`` (MAC) is in ``mmada.nn.mixers.memory_context``. x̃ are the persistent tokens, then x; attention has
its own in the form of keys and values, which is the same thing (section 3.3).

# B batch, T tokens, D model, H memories
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import silu

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache, State
from mmada.nn.chunks import Rows
from mmada.nn.context import Context
from mmada.nn.documents import Documents
from mmada.nn.memory_layer import NeuralMemory
from mmada.nn.mixers.attention import Attention
from mmada.nn.observing import observe

Outcome = tuple[Tensor, Tensor | None]  # (B, T, D), and ‖u_t‖ of each memory (B, T, H) where it was computed


def scan_rows(
    scan: Callable[[Tensor, State | None, Context], tuple[Outcome, State]],
    hidden_BTD: Tensor,
    context: Context,
    cache: MMaDACache | None,
    layer_idx: int,
) -> Outcome:
    """What ``scan`` makes of the new tokens from the layer's state on, of documents each from the start."""

    def over_documents(hidden: Tensor, state: State | None, context: Context) -> tuple[Outcome, State]:
        if context.documents_BT is None:
            return scan(hidden, state, context)
        documents = Documents.of(context)
        (output, surprise), after = scan(documents.split(hidden), None, documents.context)
        surprise = None if surprise is None else documents.join(surprise)
        return (documents.join(output), surprise), {name: each[documents.last_B] for name, each in after.items()}

    if cache is None:
        return over_documents(hidden_BTD, None, context)[0]
    return cache.layers[layer_idx].recurrent("memory").run(over_documents, hidden_BTD, context)


def learn(
    memory: NeuralMemory, hidden_BTD: Tensor, context: Context, cache: MMaDACache | None, layer_idx: int
) -> Tensor:
    """M(x̃), (B, T, D)."""

    def scan(hidden: Tensor, state: State | None, context: Context) -> tuple[Outcome, State]:
        learned = memory(hidden, state, Rows.of(context))
        return (learned.output_BTD, learned.surprise_BTH), learned.state

    output, surprise = scan_rows(scan, hidden_BTD, context, cache, layer_idx)
    report_surprise(memory, surprise, context)
    return output


def report_surprise(memory: NeuralMemory, surprise_BTH: Tensor | None, context: Context) -> None:
    """Hand ‖u_t‖ to whoever looks: ``record(model, "surprise")``, say."""
    if surprise_BTH is not None:
        observe(memory, context.valid_BT(), surprise=surprise_BTH)


class GatedProduct(nn.Module):
    """a ⊗ b: both normed with a learned scale, then SiLU, then their product (section 4.2), projected."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.memory_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # A product of normed branches is of the size of one, whatever its branches are worth at the start; what joins
        # the residual stream shall be as small there as from any other layer.
        self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, attended_BTD: Tensor, remembered_BTD: Tensor) -> Tensor:
        return self.proj(silu(self.attention_norm(attended_BTD)) * silu(self.memory_norm(remembered_BTD)))


class Memory(nn.Module):
    """The memory alone."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.memory = NeuralMemory(config, config.memory.num_persistent_tokens)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D)."""
        return learn(self.memory, hidden_states, context, past_key_values, self.layer_idx), None


class MemoryGate(nn.Module):
    """Attention for what is near and memory for what is far, side by side: Attn(x) ⊗ M(x̃) (eqs. 26 to 28)."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.attention = memory_attention(config, layer_idx)
        self.memory = NeuralMemory(config, config.memory.num_persistent_tokens)
        self.product = GatedProduct(config)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D), and the attention's weights."""
        attended, weights = self.attention(hidden_states, context, past_key_values)
        remembered = learn(self.memory, hidden_states, context, past_key_values, self.layer_idx)
        return self.product(attended, remembered), weights


class MemoryLayer(nn.Module):
    """Memory first, then attention (eqs. 29 to 31): Attn(x + M(x̃)), with the residual that the paper has everywhere."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.memory = NeuralMemory(config, config.memory.num_persistent_tokens)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = memory_attention(config, layer_idx)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D), and the attention's weights."""
        remembered = learn(self.memory, hidden_states, context, past_key_values, self.layer_idx)
        return self.attention(self.norm(hidden_states + remembered), context, past_key_values)


def memory_attention(config: MMaDAConfig, layer_idx: int) -> Attention:
    """The attention of a layer that has a memory, too."""
    return Attention(
        config,
        layer_idx,
        kind=config.memory.attention,
        num_persistent=config.memory.num_persistent_tokens,
        state_name="attention",
    )
