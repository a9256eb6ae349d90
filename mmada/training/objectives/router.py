"""Losses that keep experts evenly used and router logits small.

# T tokens, E experts, K chosen experts, S sequences
"""

from __future__ import annotations

from collections.abc import Callable

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
    losses is the loss of the joined batch, whatever the number of workers.
    """
    probability_E = logits_TE.softmax(dim=-1).mean(dim=0)
    return logits_TE.shape[-1] * (load_E / load_tokens * probability_E).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Router z-loss: mean of (logsumexp of the logits)² (ST-MoE, arXiv:2202.08906), a scalar."""
    return logits_TE.logsumexp(dim=-1).square().mean()


def router_losses(
    layer_logits_TE: list[Tensor],
    top_k: int,
    selection_biases: list[Tensor | None],
    num_sequences: int,
    scope: str,
    reduce_load: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss and z-loss, each the mean over expert layers, and the load (layers, E) of the joined batch.

    The balance loss is taken layer by layer: pooling the layers first, as Mixtral's code does, lets one layer's
    crowd hide another's. ``reduce_load`` sums a tensor of counts over all workers; None means one worker.
    """
    load_LE = torch.stack([expert_load(z, top_k, b) for z, b in zip(layer_logits_TE, selection_biases, strict=True)])
    if reduce_load is not None:
        load_LE = reduce_load(load_LE)
    if scope == "sequence":
        pieces = [
            balance_loss(piece, expert_load(piece, top_k, bias), piece.shape[0])
            for z, bias in zip(layer_logits_TE, selection_biases, strict=True)
            for piece in z.chunk(num_sequences)
        ]
    else:
        pieces = [
            balance_loss(z, load_E, load_E.sum() / top_k) for z, load_E in zip(layer_logits_TE, load_LE, strict=True)
        ]
    return torch.stack(pieces).mean(), torch.stack([z_loss(z) for z in layer_logits_TE]).mean(), load_LE
