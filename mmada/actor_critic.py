"""A policy and, where the algorithm learns one, a value of every token: what a learner optimises.

# B rows, S tokens of a row (prompt, completion, padding), C completion tokens, D model, V vocabulary
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM

POLICY = "policy."  # how the policy's own parameters begin in an ActorCritic
CRITIC = r"^(value_head|critic)\."  # what the names of the critic's look like


@dataclass
class ActorCriticOutput:
    """Per completion token, (B, C) each: log-probability, entropy of the policy, value before the token.

    What stands behind a row's own completion means nothing. ``values_BC`` is None without a critic.
    """

    logprobs_BC: Tensor
    entropy_BC: Tensor
    values_BC: Tensor | None


class ActorCritic(nn.Module):
    """``policy`` with a value head on its last hidden states, on those of a second network, or without one.

    The head's weights start at 0, so that the first values are 0 (arXiv:2403.17031, detail 2). Dropout and the
    routers' noise are off in learning too: the ratio of new to old probability would otherwise measure them.
    """

    def __init__(self, policy: MMaDAForCausalLM, critic: Literal["shared", "separate", "none"]) -> None:
        super().__init__()
        self.policy = policy
        self.critic = copy.deepcopy(policy.model) if critic == "separate" else None
        self.value_head = nn.Linear(policy.config.embedding_size, 1) if critic != "none" else None
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self.recompute = False
        self.train(False)

    @property
    def config(self) -> MMaDAConfig:
        """The policy's."""
        return self.policy.config

    @property
    def gathered_whole(self) -> tuple[str, ...]:
        """As on the policy: classes of modules that an engine must gather with their children."""
        return self.policy.gathered_whole

    def expert_parallel_layout(self) -> dict[str, Any]:
        """As on the policy, for every network in here."""
        layout = self.policy.expert_parallel_layout()
        networks = r"(policy\.model|critic)" if self.critic is not None else r"policy\.model"
        return layout | {"moe_layer_pattern": layout["moe_layer_pattern"].replace(r"model", networks, 1)}

    def train(self, mode: bool = True) -> ActorCritic:
        """Every module stays as in evaluation, but for what ``recompute`` needs: the layers' own flag."""
        super().train(False)
        for network in (self.policy.model, self.critic) if self.recompute and mode else ():
            for layer in network.layers if network is not None else ():
                layer.training = True
        self.training = mode
        return self

    def recompute_activations(self) -> None:
        """Keep only the input of each layer in training and compute the rest anew in the backward pass."""
        for network in (self.policy, self.critic):
            if network is not None:
                network.activation_checkpointing_enable({"use_reentrant": False})
        self.recompute = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_lengths: Tensor,
        num_completion_tokens: int,
        temperature: float,
    ) -> ActorCriticOutput:
        """Judge completions: ``input_ids`` (B, S) hold prompt and completion of each row at its front.

        ``prompt_lengths`` (B,), at least 1. ``num_completion_tokens``: C, of the longest completion. The token number
        c of a completion is predicted from position ``prompt_lengths + c - 1``; log-probabilities are those of
        logits / ``temperature``, in float32.
        """
        column_C = torch.arange(num_completion_tokens, device=input_ids.device)
        place_BC = (prompt_lengths[:, None] + column_C).clamp(max=input_ids.shape[1] - 1)
        hidden_BSD = self._hidden(self.policy.model, input_ids, attention_mask)
        hidden_BCD = _at(hidden_BSD, place_BC - 1)
        logits_BCV = self.policy.logits_of(hidden_BCD).float() / temperature
        all_logprobs_BCV = logits_BCV.log_softmax(dim=-1)
        logprobs_BC = all_logprobs_BCV.gather(2, input_ids.gather(1, place_BC)[..., None])[..., 0]
        entropy_BC = -(all_logprobs_BCV.exp() * all_logprobs_BCV).sum(dim=-1)
        if self.value_head is None:
            return ActorCriticOutput(logprobs_BC, entropy_BC, None)
        if self.critic is not None:
            hidden_BCD = _at(self._hidden(self.critic, input_ids, attention_mask), place_BC - 1)
        values_BC = self.value_head(hidden_BCD)[..., 0].float()
        return ActorCriticOutput(logprobs_BC, entropy_BC, values_BC)

    @staticmethod
    def _hidden(network: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return network(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _at(hidden_BSD: Tensor, place_BC: Tensor) -> Tensor:
    """The states at the given places of each row, (B, C, D)."""
    return hidden_BSD.gather(1, place_BC[..., None].expand(-1, -1, hidden_BSD.shape[2]))
