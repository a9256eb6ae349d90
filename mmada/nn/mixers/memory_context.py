"""Memory as context (Titans, arXiv:2501.00663, section 4.1): what the past has to say is put before the present.

Rows are read in segments of ``segment_size`` tokens. What the memory, as of the end of the segment before, answers a
token is a further token h of the segment (eq. 21); attention goes over the persistent tokens and [h_1 x_1 h_2 x_2 …]
(eqs. 22, 23), in this order because then plain causality keeps each token from what later ones asked. The memory learns
attention's output y (eq. 24), and the layer's output is y ⊗ M_t(y) (eq. 25).

# B batch, T tokens, D model, P segments, C columns of a segment, H memories, G key/value heads, K head_dim
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmada.config import MMaDAConfig
from mmada.nn.cache import LayerState, MMaDACache, State
from mmada.nn.chunks import Rows
from mmada.nn.context import Context
from mmada.nn.memory_layer import MemoryQuery, NeuralMemory, ReadOut, pack_state, unpack_state
from mmada.nn.mixers.attention import Attention
from mmada.nn.mixers.memory import GatedProduct, Outcome, report_surprise, scan_rows
from mmada.nn.neural_memory import MemoryState, Weights, run_memory
from mmada.nn.positions import rotary_cos_sin


class SegmentAttention(Attention):
    """Attention among the tokens of a segment; no weights, for they would not be of the model's tokens."""

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, context, past_key_values)[0], None


class MemoryContext(nn.Module):
    """Titans with memory as context (MAC)."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.query = MemoryQuery(config)
        self.recall = ReadOut(config)
        self.attention = SegmentAttention(config, layer_idx, num_persistent=config.memory.num_persistent_tokens)
        self.memory = NeuralMemory(config)
        self.product = GatedProduct(config)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D)."""
        output, surprise = scan_rows(self._scan, hidden_states, context, past_key_values, self.layer_idx)
        report_surprise(self.memory, surprise, context)
        return output, None

    def _scan(self, hidden_BTD: Tensor, state: State | None, context: Context) -> tuple[Outcome, State]:
        rows = Rows.of(context)
        state = self._first_state(hidden_BTD) if state is None else dict(state)
        query_BHTK, asked = self.query(hidden_BTD, state.get("asked"), rows)
        if asked is not None:
            state["asked"] = asked
        segments = rows.cut(self.config.memory.segment_size)
        hidden_BPCD, query_BHPCK = segments.take(hidden_BTD, 1), segments.take(query_BHTK, 2)
        outputs, surprises = [], []
        for p, (piece, opens) in enumerate(zip(segments.rows, segments.opens, strict=True)):
            state = _open_segment(state, opens)
            recalled = self._recall(hidden_BPCD[:, p], query_BHPCK[:, :, p], state)
            attended, state = self._attend(recalled, hidden_BPCD[:, p], state, piece)
            learned = self.memory(attended, state, piece)
            state = {**state, **learned.state}
            outputs.append(self.product(attended, learned.output_BTD))
            surprises.append(learned.surprise_BTH)
        surprise = None if surprises[0] is None else segments.put(torch.stack(surprises, dim=1), 1)
        return (segments.put(torch.stack(outputs, dim=1), 1), surprise), state

    def _first_state(self, hidden_BTD: Tensor) -> State:
        weights = self.memory.start(torch.promote_types(hidden_BTD.dtype, torch.float32))
        weights = tuple(each.expand(len(hidden_BTD), -1, -1, -1) for each in weights)
        state = pack_state(MemoryState.start(weights, self.config.memory.momentum))
        return {**state, **{f"segment.{layer}": each for layer, each in enumerate(weights)}}

    def _recall(self, hidden_BCD: Tensor, query_BHCK: Tensor, state: State) -> Tensor:
        """h: what the memory as of the end of the last segment answers."""
        weights = _segment_weights(state)
        with torch.autocast(hidden_BCD.device.type, enabled=False):
            read = run_memory(weights, query_BHCK.to(weights[0].dtype), self.config.memory.activation)
        return self.recall(read, hidden_BCD)

    def _attend(self, recalled_BCD: Tensor, hidden_BCD: Tensor, state: State, piece: Rows) -> tuple[Tensor, State]:
        """y of a segment's tokens. Positions and distances count both h and x, from the segment's first."""
        both = torch.stack([recalled_BCD, hidden_BCD], dim=2).flatten(1, 2)
        context = piece.times(2).context(len(both))
        if self.config.position_embedding_type == "rope":
            context.rotary = rotary_cos_sin(self.config, context.position_ids_BT, both.dtype)
        open_segment = LayerState()  # for the attention it stands in for the layer's part of the cache
        kept = open_segment.key_values(self.attention.state_name)
        if context.past and "keys" in state:
            kept.keys, kept.values = (state[name][:, :, : context.past] for name in ("keys", "values"))
        attended, _ = self.attention(both, context, SimpleNamespace(layers={self.layer_idx: open_segment}))
        return attended[:, 1::2], {**state, **_keep_segment(state, kept.keys, kept.values, piece)}


def _segment_weights(state: State) -> Weights:
    return tuple(state[f"segment.{layer}"] for layer in range(len(unpack_state(state).weights)))


def _open_segment(state: State, opens: bool | Tensor) -> State:
    """The weights of now are those that a segment's tokens ask, in rows that begin one."""
    if opens is False:
        return state
    opened = {}
    for layer, (now, before) in enumerate(zip(unpack_state(state).weights, _segment_weights(state), strict=True)):
        opened[f"segment.{layer}"] = now if opens is True else torch.where(opens.view(-1, 1, 1, 1), now, before)
    return {**state, **opened}


def _keep_segment(state: State, keys: Tensor, values: Tensor, piece: Rows) -> State:
    """Keys and values of the open segments (B, G, 2·tokens, K); rows without a token in this piece keep theirs."""
    if "keys" not in state or bool((piece.new_R > 0).all()):
        return {"keys": keys, "values": values}
    has_B111 = (piece.new_R > 0).to(keys.device).view(-1, 1, 1, 1)
    kept = {}
    for name, new in (("keys", keys), ("values", values)):
        old, width = state[name], max(state[name].shape[2], new.shape[2])
        old, new = (pad(each, (0, 0, 0, width - each.shape[2])) for each in (old, new))
        kept[name] = torch.where(has_B111, new, old)
    return kept
