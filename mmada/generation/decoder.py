"""The model, fed by rows of ids: whole prompts first, then a token at a time.

# B rows, T columns, V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmada.nn.cache import MMaDACache


class Decoder:
    """Logits behind rows of tokens. Call it where no gradients are recorded."""

    def __init__(self, model: Any) -> None:
        """``model``: a causal language model of the family, also with adapters of peft around it.

        Raises ValueError in training mode.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where dropout and the router's noise change what it says; call "
                "model.eval() first"
            )
        self.config = self.model.config
        self.device: torch.device = self.model.get_input_embeddings().weight.device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[MMaDACache, Tensor]:
        """The cache after these prompts, a row each, and the logits of what follows them, (B, V)."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids_BT = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self.device)
        cache = MMaDACache(self.config.num_hidden_layers)
        lengths_B = torch.tensor(lengths, device=self.device)
        mask_BT = None
        if min(lengths) < longest:
            mask_BT = torch.arange(longest, device=self.device) < lengths_B[:, None]
        hidden_BTD = self._states(ids_BT, cache, mask_BT)
        rows_B = torch.arange(len(prompts), device=self.device)
        return cache, self._logits(hidden_BTD[rows_B, lengths_B - 1])

    def step(self, tokens_B: Tensor, cache: MMaDACache) -> Tensor:
        """The logits of what follows when every row of the cache goes on with one token, (B, V)."""
        return self._logits(self._states(tokens_B[:, None], cache, None)[:, 0])

    def _states(self, ids_BT: Tensor, cache: MMaDACache, mask_BT: Tensor | None) -> Tensor:
        return self.model.model(
            input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, return_dict=True
        ).last_hidden_state

    def _logits(self, hidden_BD: Tensor) -> Tensor:
        logits_BV = self.model.lm_head(hidden_BD)
        cap = self.config.final_logit_softcapping
        return logits_BV if cap is None else cap * torch.tanh(logits_BV / cap)
