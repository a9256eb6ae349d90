"""The learned reward model: the trunk of the language model with heads that say how good a completion is.

R = Σ_i softmax(w)_i r_i over four bounded components r_i = tanh(head_i), read at the last real token of a row, and
beside it the model's own estimate of how likely it is to order a pair rightly.

# B rows, T tokens, D width of a hidden state, H components
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.utils import can_return_tuple

from mmada.config import MMaDAConfig
from mmada.data.task_rows import answer_ids, pad_right, padding_id, prompt_ids
from mmada.errors import DataError
from mmada.model import MMaDAModel
from mmada.output import MMaDAOutput
from mmada.pretrained import TrainableModel

# What a completion is judged by, in the order of the last dimension of every ``components_BH``.
COMPONENTS = ("faithfulness", "coherence", "correctness", "creativity")


@dataclass
class RewardModelOutput(MMaDAOutput):
    """``reward`` (B,) in (-1, 1), not normalised; ``confidence`` (B,) in (0, 1); ``components`` (B, H) in (-1, 1).

    All in float32 at least. ``loss``: in training the routers' losses, which a caller adds to its own; None without
    experts.
    """

    reward: Tensor | None = None
    confidence: Tensor | None = None
    components: Tensor | None = None


@dataclass(frozen=True)
class RewardOutput:
    """What one completion is worth: a normalised reward, confidence in it, and the components by name."""

    reward: float
    confidence: float
    components: dict[str, float]


class RewardHeads(nn.Module):
    """Hidden states of last tokens to components, their weighted sum, and a confidence.

    Everything here is float32 at least, whatever the trunk's type: differences of rewards are small. The parameters
    are used in this module's own call, where an engine that shards them has them whole. ``reward_mean`` and
    ``reward_std`` are those of reference samples.
    """

    reward_mean: Tensor
    reward_std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        num = len(COMPONENTS)
        self.component_weight = nn.Parameter(torch.empty(num, width))
        self.component_bias = nn.Parameter(torch.empty(num))
        self.mixture = nn.Parameter(torch.empty(num))
        self.confidence_weight = nn.Parameter(torch.empty(1, width + 2 * num))
        self.confidence_bias = nn.Parameter(torch.empty(1))
        self.register_buffer("reward_mean", torch.empty(()))
        self.register_buffer("reward_std", torch.empty(()))

    def init_own_weights(self, config: MMaDAConfig) -> None:
        """Components N(0, 1/(D+1)) with bias 0 (Huang et al., The N implementation details of RLHF with PPO)."""
        init.normal_(self.component_weight, mean=0.0, std=1 / math.sqrt(self.component_weight.shape[1] + 1))
        for zero in (self.component_bias, self.mixture, self.confidence_weight, self.confidence_bias):
            init.zeros_(zero)
        init.zeros_(self.reward_mean)
        init.ones_(self.reward_std)

    def forward(self, last_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reward (B,), confidence (B,) and components (B, H). The confidence sends no gradient to the rest."""
        dtype = torch.promote_types(last_BD.dtype, torch.float32)
        last_BD = last_BD.to(dtype)
        components_BH = torch.tanh(F.linear(last_BD, self.component_weight.to(dtype), self.component_bias.to(dtype)))
        reward_B = components_BH @ self.mixture.to(dtype).softmax(dim=0)
        # Squares, because a reward at either end is surer than one in the middle.
        known = torch.cat([last_BD, components_BH, components_BH.square()], dim=1).detach()
        logit_B = F.linear(known, self.confidence_weight.to(dtype), self.confidence_bias.to(dtype))[:, 0]
        return reward_B, logit_B.sigmoid(), components_BH


class MMaDARewardModel(TrainableModel):
    """Scores rows of tokens: raw in ``forward``, normalised in ``score``."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config)
        self.model = MMaDAModel(config)
        self.heads = RewardHeads(config.embedding_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput:
        """Rewards of (B, T) ids, read at each row's last token that ``attention_mask`` (B, T) does not hide."""
        kwargs["use_cache"] = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        hidden_BTD = outputs.last_hidden_state
        reward_B, confidence_B, components_BH = self.heads(last_states(hidden_BTD, attention_mask))
        result = RewardModelOutput(
            reward=reward_B,
            confidence=confidence_B,
            components=components_BH,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            num_patches=getattr(outputs, "num_patches", None),
        )
        if self.training and outputs.router_logits:
            result.loss = reward_B.new_zeros(())
            self._add_router_losses(result, attention_mask, hidden_BTD.shape[1])
        return result

    @torch.no_grad()
    def set_normalisation(self, mean: float, std: float) -> None:
        """Bring rewards of samples with this mean and standard deviation to mean 0 and variance 1 in ``score``."""
        self.heads.reward_mean.fill_(mean)
        self.heads.reward_std.fill_(max(std, 1e-6))

    @torch.no_grad()
    def score(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        batch_size: int = 32,
    ) -> list[RewardOutput]:
        """What each completion of its prompt is worth, normalised, in evaluation mode.

        Raises ValueError for lists of unequal length, DataError for a row longer than the model's positions.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions; give one of each")
        rows = [scored_ids(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        longest, limit = max(map(len, rows), default=0), self.config.max_position_embeddings
        if longest > limit:
            raise DataError(
                f"a completion takes {longest} tokens with its prompt, and the reward model has "
                f"max_position_embeddings={limit}; give shorter ones, or another reward model"
            )
        was_training = self.training
        self.eval()
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # little padding
        found: dict[int, RewardOutput] = {}
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            found |= dict(zip(chosen, self._score_rows(tokenizer, [rows[index] for index in chosen]), strict=True))
        self.train(was_training)
        return [found[index] for index in range(len(rows))]

    def _score_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[RewardOutput]:
        longest = max(map(len, rows))
        ids_BT = pad_right(rows, longest, padding_id(tokenizer)).to(self.device)
        mask_BT = pad_right([[1] * len(row) for row in rows], longest, 0).to(self.device)
        output = self(input_ids=ids_BT, attention_mask=mask_BT)
        normalised_B = (output.reward - self.heads.reward_mean.float()) / self.heads.reward_std.float()
        columns = normalised_B.tolist(), output.confidence.tolist(), output.components.tolist()
        return [
            RewardOutput(reward, confidence, dict(zip(COMPONENTS, components, strict=True)))
            for reward, confidence, components in zip(*columns, strict=True)
        ]


def scored_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """The row that a reward is read from: prompt, completion, end of text."""
    return [*prompt_ids(tokenizer, prompt), *answer_ids(tokenizer, completion)]


def last_states(hidden_BTD: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    """The state at each row's last real token, (B, D); padding may stand anywhere."""
    if attention_mask_BT is None:
        return hidden_BTD[:, -1]
    column_T = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)
    last_B = (attention_mask_BT.bool() * column_T).argmax(dim=1)
    return hidden_BTD[torch.arange(len(last_B), device=hidden_BTD.device), last_B]


AutoModelForSequenceClassification.register(MMaDAConfig, MMaDARewardModel)
