"""Losses that keep experts evenly used and router logits small.

# T tokens, E experts, K chosen experts, S sequences
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmada.nn.router import choose_experts


@dataclass
class RouterLosses:
    """``balance`` and ``z``: to be minimised. ``load`` (layers, E): tokens that chose each expert, over all workers.

    ``source_balance``: another measure of balance, 1 where all are used alike; see there.
    """

    balance: Tensor
    z: Tensor
    load: Tensor
    source_balance: Tensor


def expert_load(logits_TE: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Tensor:
    """How many of the tokens chose each expert: (E,), float32, no gradient."""
    with torch.no_grad():
        index_TK = choose_experts(logits_TE, top_k, selection_bias=selection_bias)[1]
        return torch.bincount(index_TK.flatten(), minlength=logits_TE.shape[-1]).to(torch.float32)


@torch.no_grad()
def expert_use(logits_TE: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Tensor:
    """What each expert got of the tokens, (3, E), float32: choices; weights, over the chosen 1; probabilities."""
    weights_TK, index_TK = choose_experts(logits_TE, top_k, selection_bias=selection_bias)
    load_E = torch.bincount(index_TK.flatten(), minlength=logits_TE.shape[-1])
    weight_E = importance(weights_TK, index_TK, logits_TE.shape[-1])
    probability_E = logits_TE.softmax(dim=-1).sum(dim=0)
    return torch.stack([each.to(torch.float32) for each in (load_E, weight_E, probability_E)])


def balance_loss(logits_TE: Tensor, load_E: Tensor, load_tokens: Tensor | float) -> Tensor:
    """Switch balance loss E · Σ_e f_e P_e (arXiv:2101.03961, eqs. 4 to 6), a scalar; K when balanced.

    f_e = ``load_E`` / ``load_tokens`` is the share of tokens that chose expert e, counted over all K choices as in
    transformers' Mixtral; P_e the mean probability of e over these tokens. ``load_E`` carries no gradient and may
    have been counted over more tokens than these: with the load of the joined batch, the mean of the workers'
    losses is the loss of the joined batch, whatever the number of workers. Of no tokens it is 0.
    """
    probability_E = logits_TE.softmax(dim=-1).sum(dim=0) / max(1, logits_TE.shape[0])
    return logits_TE.shape[-1] * (load_E / load_tokens * probability_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss: mean of (logsumexp of the logits)² (ST-MoE, arXiv:2202.08906), a scalar; 0 of no tokens."""
    return logits_TE.logsumexp(dim=-1).square().sum() / max(1, logits_TE.shape[0])


def squared_coefficient_of_variation(values_E: Tensor) -> Tensor:
    """Variance over squared mean, a scalar; 0 where all are equal. CV² of Shazeer et al. 2017, arXiv:1701.06538."""
    return values_E.var(correction=0) / values_E.mean().square()


def importance(weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    """Σ over tokens of the weight that each expert got, (E,) (arXiv:1701.06538, eq. 6)."""
    return weights_TK.new_zeros(num_experts).index_add(0, index_TK.flatten(), weights_TK.flatten())


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, spread_TE: Tensor, top_k: int) -> Tensor:
    """How many tokens each expert would get if its own noise were drawn anew, (E,) (arXiv:1701.06538, eqs. 8 to 10).

    Load_e = Σ_t Φ((clean_te - the top_k-th greatest noisy logit of the others) / spread_te); unlike a count it has
    gradients. ``spread_TE`` is the noise's standard deviation, which must be positive.
    """
    num_experts = clean_TE.shape[-1]
    if top_k >= num_experts:
        return clean_TE.new_full((num_experts,), clean_TE.shape[0])
    best = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, top_k - 1, None], best[:, top_k, None]
    threshold_TE = torch.where(noisy_TE >= last_in, first_out, last_in)
    return torch.special.ndtr((clean_TE - threshold_TE) / spread_TE).sum(dim=0)


def source_balance(weight_E: Tensor, probability_E: Tensor) -> Tensor:
    """E · Σ_e (mean weight of e) · (mean probability of e), from their sums over tokens; 1 where all are used alike.

    Only to be read: where weights and probabilities run against each other it falls below 1, so minimising it would
    not balance the experts. Of no tokens it is 0.
    """
    tokens = probability_E.sum().clamp(min=1)
    return len(weight_E) * (weight_E / tokens * probability_E / tokens).sum()


def without_padding(layer_logits_TE: Sequence[Tensor], real_BT: Tensor) -> tuple[list[Tensor], list[int]]:
    """Logits (B·T, E) of the real tokens alone, and how many of these each row has."""
    return [logits_TE[real_BT.flatten()] for logits_TE in layer_logits_TE], real_BT.sum(dim=1).tolist()


def router_losses(
    layer_logits_TE: list[Tensor],
    top_k: int,
    selection_biases: list[Tensor | None],
    sequence_lengths: int | list[int],
    scope: str,
    reduce_load: Callable[[Tensor], Tensor] | None,
) -> RouterLosses:
    """The losses, each the mean over expert layers, and what the experts got of the joined batch.

    The balance loss is taken layer by layer: pooling the layers first, as Mixtral's code does, lets one layer's
    crowd hide another's. ``reduce_load`` sums a tensor of counts over all workers; None means one worker.
    ``sequence_lengths``: tokens of every sequence, or of each where they differ; workers with more tokens then count
    for more, so that their mean is that over all tokens.
    """
    pairs = list(zip(layer_logits_TE, selection_biases, strict=True))
    use_3LE = torch.stack([expert_use(logits_TE, top_k, bias) for logits_TE, bias in pairs], dim=1)
    if reduce_load is not None:
        use_3LE = reduce_load(use_3LE)
    load_LE, weight_LE, probability_LE = use_3LE
    if scope == "sequence":
        pieces = [
            balance_loss(piece, expert_load(piece, top_k, bias), max(1, piece.shape[0]))
            for logits_TE, bias in pairs
            for piece in logits_TE.split(sequence_lengths)
        ]
    else:
        pieces = [
            balance_loss(z, load_E, (load_E.sum() / top_k).clamp(min=1))
            for z, load_E in zip(layer_logits_TE, load_LE, strict=True)
        ]
    balance, z = torch.stack(pieces).mean(), torch.stack([z_loss(z) for z in layer_logits_TE]).mean()
    if reduce_load is not None and isinstance(sequence_lengths, list):
        mean_tokens = load_LE[0].sum() / top_k / reduce_load(torch.ones_like(load_LE[0, :1]))[0]
        share = layer_logits_TE[0].shape[0] / mean_tokens.clamp(min=1)
        balance, z = balance if scope == "sequence" else share * balance, share * z
    source = torch.stack([source_balance(*layer) for layer in zip(weight_LE, probability_LE, strict=True)]).mean()
    return RouterLosses(balance, z, load_LE, source)
