"""From logits to tokens, with noise that is a function of a completion's seed and of the token's place in it.

# B rows, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from mmada.generation.settings import SamplingSettings
from mmada.nn.router import mix64

STREAM = 0x53414D504C45  # keeps this noise apart from that of training, which is made of the same numbers


class Drawn(NamedTuple):
    """Tokens, and the logarithms of their probabilities in the whole and in the cut distribution, (B,) each."""

    tokens_B: Tensor
    logprobs_B: Tensor
    sampling_logprobs_B: Tensor


def draw(logits_BV: Tensor, seeds_B: Tensor, index_B: Tensor, settings: SamplingSettings) -> Drawn:
    """Token number ``index_B`` of the completions with these seeds (int64). In float32 at least."""
    scores_BV = tempered(logits_BV, settings.temperature)
    logprobs_BV = scores_BV.log_softmax(dim=-1)
    if settings.temperature == 0:
        tokens_B = scores_BV.argmax(dim=-1)
        return Drawn(tokens_B, pick(logprobs_BV, tokens_B), torch.zeros_like(logprobs_BV[:, 0]))
    kept_BV = truncated(scores_BV, settings.top_k, settings.top_p)
    sampling_BV = logprobs_BV if kept_BV is scores_BV else kept_BV.log_softmax(dim=-1)
    tokens_B = invert(sampling_BV, uniform(seeds_B, index_B))
    logprobs_B = pick(logprobs_BV, tokens_B)
    return Drawn(tokens_B, logprobs_B, logprobs_B if kept_BV is scores_BV else pick(sampling_BV, tokens_B))


def tempered(logits_BV: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 at least; as they are at temperature 0."""
    scores_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
    return scores_BV if temperature in (0, 1) else scores_BV / temperature


def truncated(scores_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores with -inf for what top-k and then top-p leave out; with neither, the very tensor.

    As transformers' ``TopKLogitsWarper`` and ``TopPLogitsWarper`` do it: tokens that tie with the k-th stay, and of
    those that tie at the edge of p the sort decides.
    """
    vocab_size = scores_BV.shape[-1]
    if 0 < top_k < vocab_size:
        least_B1 = scores_BV.topk(top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = scores_BV.sort(dim=-1)
        leaves_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        leaves_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(leaves_BV.scatter(1, order_BV, leaves_BV), -torch.inf)
    return scores_BV


def uniform(seeds_B: Tensor, index_B: Tensor) -> Tensor:
    """Numbers even over (0, 1), float64 (B,), a pure function of seed and index (int64)."""
    bits_B = mix64(mix64(seeds_B ^ STREAM) + index_B)
    return ((bits_B & (2**52 - 1)).double() + 0.5) / 2**52


def invert(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at which the probabilities, added up in the vocabulary's order, pass ``uniform_B``; (B,)."""
    total_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    last_B1 = total_BV[:, -1:].contiguous()
    token_B1 = torch.searchsorted(total_BV, uniform_B[:, None] * last_B1, right=True)
    # A product that was rounded up to the total must not end behind the last token that has a probability; nor NaN
    # behind the vocabulary.
    last_token_B1 = torch.searchsorted(total_BV, last_B1).clamp(max=total_BV.shape[1] - 1)
    return torch.minimum(token_B1, last_token_B1).squeeze(1)


def pick(values_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """The value of each row's token, (B,)."""
    return values_BV.gather(1, tokens_B[:, None]).squeeze(1)


def as_int64(seeds: Iterable[int], device: torch.device) -> Tensor:
    """Whole numbers of any size as int64, by their lowest 64 bits."""
    return torch.tensor([(seed + 2**63) % 2**64 - 2**63 for seed in seeds], dtype=torch.int64, device=device)
