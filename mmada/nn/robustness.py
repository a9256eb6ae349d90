"""Noise on the input embeddings in training, so that the model leans on no single token or channel.

# B batch, T tokens, D model
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.router import counter_uniform

# The router's noise of layer i is stream i; these are apart from it.
_MASK_STREAM, _DROPOUT_STREAM = -1, -2


class InputNoise(nn.Module):
    """Token masking, then dropout, on (B, T, D) in training; nothing in evaluation.

    A share ``token_mask_probability`` of the tokens is replaced by one learned vector, and a share
    ``embedding_dropout`` of all elements by zero, what is left being scaled up by 1 / (1 - p).
    """

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.mask_probability, self.dropout = config.token_mask_probability, config.embedding_dropout
        self.mask_embedding: nn.Parameter | None = None
        if self.mask_probability:
            self.mask_embedding = nn.Parameter(torch.empty(config.hidden_size))
            nn.init.normal_(self.mask_embedding, std=config.initializer_range)

    def init_own_weights(self, config: MMaDAConfig) -> None:
        if self.mask_embedding is not None:
            init.normal_(self.mask_embedding, std=config.initializer_range)

    def forward(self, embeddings_BTD: Tensor, noise_keys_T: Tensor | None) -> Tensor:
        """``noise_keys_T`` (B·T,), int64, one for each token: the noise is a pure function of it."""
        if not self.training:
            return embeddings_BTD
        shape = embeddings_BTD.shape
        if self.mask_embedding is not None:
            masked_BT1 = counter_uniform(noise_keys_T, 1, _MASK_STREAM).view(*shape[:2], 1) < self.mask_probability
            embeddings_BTD = torch.where(masked_BT1, self.mask_embedding.to(embeddings_BTD.dtype), embeddings_BTD)
        if self.dropout:
            kept_BTD = counter_uniform(noise_keys_T, shape[2], _DROPOUT_STREAM).view(shape) >= self.dropout
            embeddings_BTD = embeddings_BTD * kept_BTD / (1 - self.dropout)
        return embeddings_BTD
