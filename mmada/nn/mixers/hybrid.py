"""Attention and a state space in one layer, joined by a gate, with a memory of slots beside the state space.

With attention's output A, and R of the recurrent side: the state space's plus what is read from the slots, three
fusions:

- ``residual``: A + tanh(a) g ∘ R with a learned a per channel, 0 at the start (as in Flamingo, arXiv:2204.14198).
  The layer starts as plain attention, to the bit. R then has no gradient in the first step: a must move first.
- ``source``: (1 - g) ∘ A + g ∘ R. With a gate bias of -0.3 R makes 43 % of the output from the start.
- ``routed``: a router sends each token to A or to R, and the output is scaled by the probability of the choice, which
  gives the router its gradient (Switch, arXiv:2101.03961, eq. 2). The side not taken is not computed for the token
  and does not see it: each side goes over its own tokens as if they were all (see ``mmada.nn.branches``).

g = σ(W h + b) per channel; the router's is one number per token, the probability of R.

# B batch, T tokens, D model
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.branches import BranchState, run_branch
from mmada.nn.cache import MMaDACache
from mmada.nn.context import Context
from mmada.nn.mixers.attention import Attention
from mmada.nn.mixers.ssm import SSM
from mmada.nn.observing import observe
from mmada.nn.slots import SlotMemory


class Gate(nn.Module):
    """σ(W h + b) in float32 at least; b starts as ``hybrid.gate_bias``.

    No ``nn.Linear``: adapters would add what they learn to the output of one, here behind the σ.
    """

    def __init__(self, config: MMaDAConfig, num_gates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_gates, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(num_gates))
        self.init_own_weights(config)

    def init_own_weights(self, config: MMaDAConfig) -> None:
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)
        init.constant_(self.bias, config.hybrid.gate_bias)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        logits = nn.functional.linear(hidden_BTD, self.weight, self.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class RecurrentSide(nn.Module):
    """The state space, and the memory of slots if there is one, over the same tokens; their outputs added."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.ssm = SSM(config, layer_idx, state_name="ssm")
        self.memory = SlotMemory(config, layer_idx, state_name="slots") if config.hybrid.memory_slots else None

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        mixed, _ = self.ssm(hidden_states, context, past_key_values)
        if self.memory is not None:
            mixed = mixed + self.memory(hidden_states, context, past_key_values)
        return mixed, None


class GatedHybrid(nn.Module):
    """Attention and the recurrent side added up: fusions ``residual`` and ``source``."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.attention = Attention(config, layer_idx, kind=config.hybrid.attention)
        self.recurrent = RecurrentSide(config, layer_idx)
        self.gate = Gate(config, num_gates=config.hidden_size)
        self.opening: nn.Parameter | None = None
        if config.hybrid.fusion == "residual":
            self.opening = nn.Parameter(torch.zeros(config.hidden_size))

    def init_own_weights(self, config: MMaDAConfig) -> None:
        if self.opening is not None:
            init.zeros_(self.opening)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) to (B, T, D), and the attention's weights where its kernel knows them."""
        attended, weights = self.attention(hidden_states, context, past_key_values)
        carried, _ = self.recurrent(hidden_states, context, past_key_values)
        gate_BTD = self.gate(hidden_states)
        observe(self, context.valid_BT(), gate=gate_BTD)
        if self.opening is None:
            mixed = (1 - gate_BTD) * attended + gate_BTD * carried
            return mixed.to(hidden_states.dtype), weights
        added = self.opening.to(gate_BTD.dtype).tanh() * gate_BTD * carried
        return attended + added.to(attended.dtype), weights


class AttentionSide(Attention):
    """Attention among the tokens that come. Whoever collects weights gets none: theirs are not by the row's columns."""

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        return super().forward(hidden_states, context, past_key_values)[0], None


class RoutedHybrid(nn.Module):
    """Each token through attention or through the recurrent side: fusion ``routed``."""

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.attention = AttentionSide(config, layer_idx, kind=config.hybrid.attention)
        self.recurrent = RecurrentSide(config, layer_idx)
        self.gate = Gate(config, num_gates=1)

    def forward(
        self, hidden_states: Tensor, context: Context, past_key_values: MMaDACache | None = None
    ) -> tuple[Tensor, None]:
        """(B, T, D) to (B, T, D)."""
        probability_BT1 = self.gate(hidden_states)
        is_carried_BT = probability_BT1.squeeze(-1) > 0.5
        valid_BT = context.valid_BT()
        observe(self, valid_BT, gate=probability_BT1, recurrent_share=lambda: is_carried_BT[..., None].float())
        mixed = torch.zeros_like(hidden_states)
        for name, side, takes_BT in (
            ("attention_branch", self.attention, ~is_carried_BT),
            ("recurrent_branch", self.recurrent, is_carried_BT),
        ):
            state = None
            if past_key_values is not None:
                layer = past_key_values.layers[self.layer_idx]
                state = layer.part(name, lambda: BranchState(self.layer_idx))
            mixed = mixed + run_branch(
                side,
                hidden_states,
                takes_BT if valid_BT is None else takes_BT & valid_BT,
                context,
                state,
                # Engines that shard parameters wait until every worker has called a layer, in training and in
                # evaluation; in decoding, which they leave to others, it would cost a good part of the token's time.
                always=self.training or context.past == 0,
            )
        chosen_BT1 = torch.where(is_carried_BT[..., None], probability_BT1, 1 - probability_BT1)
        return mixed * chosen_BT1.to(mixed.dtype), None


def build_hybrid(config: MMaDAConfig, layer_idx: int) -> nn.Module:
    """The layer of ``hybrid.fusion``."""
    return RoutedHybrid(config, layer_idx) if config.hybrid.fusion == "routed" else GatedHybrid(config, layer_idx)
