"""Losses that keep experts evenly used and router logits small.

# T tokens, E experts, K chosen experts, S sequences
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def expert_load(logits_TE: Tensor, top_k: int, selection_bias: Tensor | None = None) -> Tensor:
    """How many of the tokens chose each expert: (E,), float32, no gradient."""
    with torch.no_grad():
        scores_TE = logits_TE.softmax(dim=-1)
        choice_TE = scores_TE if selection_bias is None else scores_TE + selection_bias
        index = choice_TE.topk(top_k, dim=-1).indices.flatten()
        return torch.bincount(index, minlength=logits_TE.shape[-1]).to(torch.float32)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss and z-loss, each the mean over expert layers, and the load (layers, E) of the joined batch.

    The balance loss is taken layer by layer: pooling the layers first, as Mixtral's code does, lets one layer's
    crowd hide another's. ``reduce_load`` sums a tensor of counts over all workers; None means one worker.
    ``sequence_lengths``: tokens of every sequence, or of each where they differ; workers with more tokens then count
    for more, so that their mean is that over all tokens.
    """
    load_LE = torch.stack([expert_load(z, top_k, b) for z, b in zip(layer_logits_TE, selection_biases, strict=True)])
    if reduce_load is not None:
        load_LE = reduce_load(load_LE)
    if scope == "sequence":
        pieces = [
            balance_loss(piece, expert_load(piece, top_k, bias), max(1, piece.shape[0]))
            for z, bias in zip(layer_logits_TE, selection_biases, strict=True)
            for piece in z.split(sequence_lengths)
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
    return balance, z, load_LE
