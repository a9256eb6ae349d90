"""The neural memory as a layer: what it is told to learn, what it is asked, and what becomes of its answer.

# B batch, T tokens, D model, H memories, K head_dim, I and O inputs and outputs of a memory's layer, N persistent
# tokens, S tokens that the convolution keeps
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, silu
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.cache import State
from mmada.nn.causal_conv import CausalConv
from mmada.nn.chunks import Rows
from mmada.nn.neural_memory import Gates, MemoryRule, MemoryState, Weights, memory_scan
from mmada.nn.observing import is_anyone_looking

# Logits of θ / max_step, η and α at the start: small steps, long momentum, almost no forgetting.
STEP_BIAS, MOMENTUM_BIAS, FORGETTING_BIAS = -2.0, 2.0, -4.0


class MemoryStart(nn.Module):
    """The memory's weights before the first token, learned like any other."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        memory = config.memory
        hidden = [int(memory.head_dim * memory.expansion)] * (memory.depth - 1)
        self.widths = [memory.head_dim, *hidden, memory.head_dim]
        for layer, (inputs, outputs) in enumerate(zip(self.widths[:-1], self.widths[1:], strict=True)):
            self.register_parameter(f"weight_{layer}", nn.Parameter(torch.zeros(memory.num_heads, inputs, outputs)))

    def init_own_weights(self, config: MMaDAConfig) -> None:
        # The last layer is small, so that what nobody has told the memory yet is answered with next to nothing.
        sizes = [1.0] * (len(self.widths) - 2) + [0.1]
        for layer, (size, inputs) in enumerate(zip(sizes, self.widths, strict=False)):
            init.normal_(self.get_parameter(f"weight_{layer}"), mean=0.0, std=size * inputs**-0.5)

    def forward(self, dtype: torch.dtype) -> Weights:
        """Each (1, H, I, O)."""
        layers = range(len(self.widths) - 1)
        # Copies, because an engine may take a parameter's storage away once this module has run.
        return tuple(self.get_parameter(f"weight_{layer}").to(dtype, copy=True)[None] for layer in layers)


class ReadOut(nn.Module):
    """The answers of all memories, gated by the token that asked, and projected.

    They are not normed: a memory that has learnt nothing of a key says little, and should.
    """

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        inner = config.memory.num_heads * config.memory.head_dim
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, read_BHTK: Tensor, hidden_BTD: Tensor) -> Tensor:
        gate_BTC = silu(self.gate_proj(hidden_BTD).to(read_BHTK.dtype))
        return self.out_proj((read_BHTK.transpose(1, 2).flatten(2) * gate_BTC).to(hidden_BTD.dtype))


class MemoryQuery(nn.Module):
    """What a memory is asked by tokens that it does not learn."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.memory.num_heads * config.memory.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.convolution = CausalConv(inner, config.memory.conv_kernel) if config.memory.convolution else None

    def forward(self, hidden_BTD: Tensor, before_BSC: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, H, T, K), and the convolution's state."""
        query = self.q_proj(hidden_BTD)
        if self.convolution is not None:
            query, before_BSC = self.convolution(query, before_BSC, rows.context(len(query)))
        return normalize(_heads(silu(query), self.config), dim=-1), before_BSC


class Learned(NamedTuple):
    """``output_BTD``; ``surprise_BTH``: ‖u_t‖ of each memory, None where nothing needed it; the state afterwards."""

    output_BTD: Tensor
    surprise_BTH: Tensor | None
    state: State


class NeuralMemory(nn.Module):
    """``num_heads`` memories side by side that learn every token and then answer it.

    k, v and q are SiLU of a short convolution of projections, k and q of length 1. ``num_persistent`` learned tokens
    stand before every sequence (eq. 19): the memory learns them first, in chunks of their own. They are the same for
    all rows, so what is computed of them is computed once.
    """

    def __init__(self, config: MMaDAConfig, num_persistent: int = 0) -> None:
        super().__init__()
        self.config, memory = config, config.memory
        inner = memory.num_heads * memory.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * inner, bias=False)
        self.convolution = CausalConv(3 * inner, memory.conv_kernel) if memory.convolution else None
        self.gate_proj = nn.Linear(config.hidden_size, len(self._biases) * memory.num_heads, bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(len(self._biases), memory.num_heads))
        self.start = MemoryStart(config)
        self.read_out = ReadOut(config)
        self.persistent_ND: nn.Parameter | None = None
        if num_persistent:
            self.persistent_ND = nn.Parameter(torch.zeros(num_persistent, config.hidden_size))
        self.rule = MemoryRule(
            chunk_size=memory.chunk_size,
            activation=memory.activation,
            max_gradient_norm=memory.max_gradient_norm,
            gate=memory.gate,
            threshold=memory.surprise_threshold,
            temperature=memory.surprise_temperature,
        )

    @property
    def _biases(self) -> list[float]:
        """Of θ, and of η and α where there are any."""
        memory = self.config.memory
        return [STEP_BIAS, *[MOMENTUM_BIAS] * memory.momentum, *[FORGETTING_BIAS] * memory.forgetting]

    def init_own_weights(self, config: MMaDAConfig) -> None:
        init.copy_(self.gate_bias, torch.tensor(self._biases)[:, None].expand_as(self.gate_bias))
        if self.persistent_ND is not None:
            init.normal_(self.persistent_ND, mean=0.0, std=1.0)  # the size of the normed tokens behind them

    def forward(self, hidden_BTD: Tensor, state: State | None, rows: Rows) -> Learned:
        """Learn (B, T, D) and answer it, from ``state`` on; None: from the start."""
        if state is None:
            state = self._first_state(hidden_BTD)
        return self._learn(hidden_BTD, state, rows)

    def _first_state(self, hidden_BTD: Tensor) -> State:
        weights = self.start(torch.promote_types(hidden_BTD.dtype, torch.float32))
        state = pack_state(MemoryState.start(weights, self.config.memory.momentum))
        if self.persistent_ND is not None:
            rows = Rows.even(len(self.persistent_ND), device=hidden_BTD.device)
            state = self._learn(self.persistent_ND.to(hidden_BTD)[None], state, rows).state
        return {name: each.expand(hidden_BTD.shape[0], *each.shape[1:]) for name, each in state.items()}

    def _learn(self, hidden_BTD: Tensor, state: State, rows: Rows) -> Learned:
        qkv, after = self.qkv_proj(hidden_BTD), {}
        if self.convolution is not None:
            qkv, after["convolution"] = self.convolution(qkv, state.get("convolution"), rows.context(len(qkv)))
        memory = unpack_state(state)
        wide = memory.weights[0].dtype
        query, key, value = (_heads(each, self.config) for each in silu(qkv.to(wide)).chunk(3, dim=-1))
        query, key = normalize(query, dim=-1), normalize(key, dim=-1)
        gates = self._gates(hidden_BTD, wide)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            remembered = memory_scan(query, key, value, gates, memory, self.rule, rows, is_anyone_looking())
        surprise = remembered.surprise_BHT
        return Learned(
            self.read_out(remembered.read_BHTK, hidden_BTD),
            None if surprise is None else surprise.transpose(1, 2),
            {**after, **pack_state(remembered.state)},
        )

    def _gates(self, hidden_BTD: Tensor, wide: torch.dtype) -> Gates:
        memory = self.config.memory
        logits = self.gate_proj(hidden_BTD).unflatten(-1, self.gate_bias.shape).to(wide) + self.gate_bias.to(wide)
        step, *others = logits.permute(2, 0, 3, 1)  # each (B, H, T)
        return Gates(
            memory.max_step * step.sigmoid(),
            logsigmoid(others[0]) if memory.momentum else None,
            logsigmoid(-others[-1]) if memory.forgetting else None,
        )


def pack_state(state: MemoryState) -> State:
    """The tensors of a memory by name, each (B, H, I, O)."""
    return {
        f"{part}.{layer}": each
        for part, layers in zip(MemoryState._fields, state, strict=True)
        for layer, each in enumerate(layers)
    }


def unpack_state(state: State) -> MemoryState:
    """What ``pack_state`` packed; other names are left out."""

    def layers(part: str) -> Weights:
        return tuple(state[f"{part}.{layer}"] for layer in range(len(state)) if f"{part}.{layer}" in state)

    return MemoryState(*(layers(part) for part in MemoryState._fields))


def _heads(states_BTC: Tensor, config: MMaDAConfig) -> Tensor:
    return states_BTC.unflatten(-1, (config.memory.num_heads, -1)).transpose(1, 2)
