"""A memory whose weights are learnt token by token while it is read (Titans, arXiv:2501.00663).

The memory M is a multilayer perceptron without biases (one layer: a matrix, read as q M). A token with key k, value v
and query q makes one step of gradient descent on ‖M(k) - v‖², summed over features, and is answered after it:

    u_t = ∇ℓ(M_start; k_t, v_t)              S_t = η_t S_{t-1} - θ_t u_t              (eqs. 9, 10)
    M_t = (1 - α_t) M_{t-1} + S_t            y_t = M_t(q_t)                           (eq. 13)

The 2 of the derivative stays (a matrix memory has u = 2 kᵀ(k M - v)); eq. 17 of the paper moves it into θ. M_start are
the weights at the start of the token's chunk, so that the gradients of a chunk do not wait for each other; with
chunks of one token M_start = M_{t-1}.

Inside a chunk S and M are first-order recurrences, so M_t = β_t M_0 + f_t S_0 - Σ_{j≤t} G_tj θ_j u_j, and the gradient
of one layer is an outer product a_j ⊗ δ_j of the layer's input and its output's gradient. Hence a token's layer is
read without ever building its weights: x M_t = β_t x M_0 + f_t x S_0 - Σ_j G_tj (x · a_j) θ_j δ_j, which is masked
linear attention. Everything is written with differentiable operations, so training through it is exact to second order.

# B batch, H memories of a row, N = B·H, T tokens, P chunks, C columns of a chunk, K width of keys and values,
# I and O inputs and outputs of a layer, R rows that differ: B or 1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mmada.nn.chunks import Chunks, Rows

Weights = tuple[Tensor, ...]  # a layer each, (B, H, I, O)


def silu_backward(gradient: Tensor, inputs: Tensor) -> Tensor:
    """Of silu; torch's own cannot be differentiated again, where its gelu_backward can."""
    sigmoid = inputs.sigmoid()
    return gradient * sigmoid * (1 + inputs * (1 - sigmoid))


# Each with its backward.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu": (gelu, torch.ops.aten.gelu_backward),
    "silu": (silu, silu_backward),
}


@dataclass(frozen=True)
class MemoryRule:
    """What does not depend on the data.

    ``chunk_size``: tokens whose gradients are taken at the same weights. ``activation``: between layers.
    ``max_gradient_norm``: u is shrunk to u / sqrt(1 + (‖u‖ / max)²), which is never longer than this; None: as it is.
    ``gate``: ``"continuous"`` learns from every token, ``"hard"`` only where ‖u‖ > ``threshold``, ``"soft"`` with the
        weight σ((‖u‖ - threshold) / ``temperature``).
    """

    chunk_size: int = 16
    activation: str = "gelu"
    max_gradient_norm: float | None = None
    gate: str = "continuous"
    threshold: float = 0.0
    temperature: float = 1.0

    @property
    def needs_surprise(self) -> bool:
        """Whether the step depends on ‖u‖."""
        return self.gate != "continuous" or self.max_gradient_norm is not None

    def step_factor(self, surprise: Tensor) -> Tensor:
        """What θ is multiplied with, given ‖u‖."""
        factor = torch.ones_like(surprise)
        if self.max_gradient_norm is not None:
            factor = torch.rsqrt(1 + (surprise / self.max_gradient_norm).square())
        if self.gate == "hard":
            return factor * (surprise > self.threshold)
        if self.gate == "soft":
            return factor * torch.sigmoid((surprise - self.threshold) / self.temperature)
        return factor


class Gates(NamedTuple):
    """θ, log η and log(1 - α) of every token, each (B, H, T); None turns momentum or forgetting off."""

    step: Tensor
    log_momentum: Tensor | None
    log_keep: Tensor | None


class MemoryState(NamedTuple):
    """``anchor``: the weights at the start of the open chunk. ``weights``: as of now. ``momentum``: S, () without."""

    anchor: Weights
    weights: Weights
    momentum: Weights

    @staticmethod
    def start(weights: Weights, momentum: bool) -> MemoryState:
        """Before the first token."""
        return MemoryState(weights, weights, tuple(torch.zeros_like(each) for each in weights) if momentum else ())


class Remembered(NamedTuple):
    """``read_BHTK``: y_t. ``surprise_BHT``: ‖u_t‖ over all layers; None where nothing needed it."""

    read_BHTK: Tensor
    state: MemoryState
    surprise_BHT: Tensor | None


def run_memory(weights: Weights, inputs: Tensor, activation: str) -> Tensor:
    """M(x), (..., T, K) to (..., T, K), with one set of weights for all T."""
    act = ACTIVATIONS[activation][0]
    for layer, weight in enumerate(weights):
        inputs = (act(inputs) if layer else inputs) @ weight
    return inputs


def memory_scan_reference(
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    gates: Gates,
    state: MemoryState,
    rule: MemoryRule,
    rows: Rows | None = None,
    want_surprise: bool = False,
) -> Remembered:
    """The recurrence token by token, its gradients from ``torch.func``; the meaning of ``memory_scan``."""
    rows = rows or Rows.even(key_BHTK.shape[2])
    past_R, new_R = rows.past_R.to(rows.device), rows.new_R.to(rows.device)

    def loss(weights: Weights, key: Tensor, value: Tensor) -> Tensor:
        return (run_memory(weights, key, rule.activation) - value).square().sum()  # memories do not share weights

    anchor, weights, momentum = state
    reads, surprises = [], []
    for t in range(rows.length):
        token = slice(t, t + 1)
        real_R = (t < new_R).view(-1, 1, 1, 1)
        opens_R = ((past_R + t) % rule.chunk_size == 0).view(-1, 1, 1, 1) & real_R
        anchor = _where(opens_R, weights, anchor)
        gradient = torch.func.grad(loss)(anchor, key_BHTK[:, :, token], value_BHTK[:, :, token])
        norm_BH = torch.stack([u.flatten(2).norm(dim=-1) for u in gradient]).norm(dim=0)
        step_BH = gates.step[:, :, t] * rule.step_factor(norm_BH)
        after = tuple(-step_BH[..., None, None] * u for u in gradient)
        if gates.log_momentum is not None:
            eta = gates.log_momentum[:, :, t, None, None].exp()
            after = tuple(eta * old + new for old, new in zip(momentum, after, strict=True))
            momentum = _where(real_R, after, momentum)
        keep = 1.0 if gates.log_keep is None else gates.log_keep[:, :, t, None, None].exp()
        weights = _where(real_R, tuple(keep * m + s for m, s in zip(weights, after, strict=True)), weights)
        reads.append(run_memory(weights, query_BHTK[:, :, token], rule.activation))
        surprises.append(norm_BH)
    return Remembered(torch.cat(reads, dim=2), MemoryState(anchor, weights, momentum), torch.stack(surprises, dim=2))


def memory_scan(
    query_BHTK: Tensor,
    key_BHTK: Tensor,
    value_BHTK: Tensor,
    gates: Gates,
    state: MemoryState,
    rule: MemoryRule,
    rows: Rows | None = None,
    want_surprise: bool = False,
) -> Remembered:
    """Learn from T tokens of each memory and answer each after it has been learnt from.

    ``rows``: where the rows stand, for chunks count from a row's first token, and how many of the T are real; None:
    T first tokens. Padding changes nothing. ``want_surprise`` has ‖u‖ returned (for reading: detached) even where the
    rule does without.
    """
    batch, heads = key_BHTK.shape[:2]
    chunks = (rows or Rows.even(key_BHTK.shape[2], device=key_BHTK.device)).cut(rule.chunk_size)
    query, key, value = (_columns(each, chunks).unbind(1) for each in (query_BHTK, key_BHTK, value_BHTK))
    step = _columns(gates.step, chunks).unbind(1)
    coefficients = chunk_coefficients(gates, chunks)
    anchor, weights, momentum = (_flat(part) for part in state)
    reads, surprises = [], []
    for p, opens in enumerate(chunks.opens):
        anchor = _open(opens, weights, anchor, heads)
        entering, leaving = loss_gradient(anchor, key[p], value[p], rule.activation)
        scale_NC = step[p]
        if want_surprise or rule.needs_surprise:
            # Without a graph where only somebody looks: gradient checkpointing must find the same one when nobody does.
            with torch.set_grad_enabled(rule.needs_surprise and torch.is_grad_enabled()):
                surprises.append(gradient_norm(entering, leaving))
        if rule.needs_surprise:
            scale_NC = scale_NC * rule.step_factor(surprises[-1])
        leaving = [each * scale_NC[..., None] for each in leaving]
        own = coefficients.of(p)
        reads.append(_read(weights, momentum, query[p], entering, leaving, own, rule.activation))
        weights, momentum = _learn(weights, momentum, entering, leaving, own)

    def joined(parts: list[Tensor]) -> Tensor:
        return chunks.put(torch.stack(parts, dim=1).unflatten(0, (batch, heads)), 2)

    last = (tuple(each.unflatten(0, (batch, heads)) for each in part) for part in (anchor, weights, momentum))
    return Remembered(joined(reads), MemoryState(*last), joined(surprises) if surprises else None)


@dataclass(frozen=True)
class Coefficients:
    """How much of what came before is in the memory after token t of a chunk, and of chunk p after the whole chunk.

    ``share_PNCC``: G without θ, what token t sees of token j's step. ``weights_PNC1``: β, of the weights at the start.
    ``momentum_PNC1``: f, of the momentum at the start. ``carried_PNC1``: what momentum keeps of token j's step to
    the chunk's end. ``kept_PN11``: what it keeps of itself. None where momentum or forgetting is off.
    """

    share_PNCC: Tensor
    weights_PNC1: Tensor | None
    momentum_PNC1: Tensor | None
    carried_PNC1: Tensor | None
    kept_PN11: Tensor | None

    def of(self, p: int) -> Coefficients:
        """Those of chunk p, the first dimension gone."""
        return Coefficients(*(None if each is None else each[p] for each in vars(self).values()))


def chunk_coefficients(gates: Gates, chunks: Chunks) -> Coefficients:
    """The two recurrences of each chunk solved, all chunks at once.

    Products of gates are differences of sums of logarithms, taken before the exponential: never above 1, and a
    product that underflows is 0, where a ratio of two of them would be 0/0.
    """

    def sums(logarithms_BHT: Tensor | None) -> Tensor | None:
        if logarithms_BHT is None:
            return None
        return _columns(logarithms_BHT, chunks).transpose(0, 1).cumsum(dim=-1)  # (P, N, C)

    keep_PNC, momentum_PNC = sums(gates.log_keep), sums(gates.log_momentum)
    (batch, heads), like = gates.step.shape[:2], gates.step
    num_chunks, width = len(chunks.rows), chunks.rows[0].length
    lower_CC = torch.ones(width, width, dtype=torch.bool, device=like.device).tril()

    def products(sums_PNC: Tensor | None) -> Tensor:
        """Of the gates after token j up to token t, (P, N, C, C), 0 above the diagonal."""
        if sums_PNC is None:
            return lower_CC.to(like.dtype).expand(num_chunks, batch * heads, width, width)
        differences = sums_PNC[..., :, None] - sums_PNC[..., None, :]
        return differences.masked_fill(~lower_CC, -torch.inf).exp()

    share, weights = products(keep_PNC), None if keep_PNC is None else keep_PNC[..., None].exp()
    if momentum_PNC is None:
        return Coefficients(share, weights, None, None, None)
    if chunks.valid_RPC is not None:  # the memory does not take S in at a column without a token
        valid_BPC = chunks.valid_RPC.expand(batch, -1, -1)
        valid_PNC = valid_BPC.repeat_interleave(heads, dim=0).transpose(0, 1)
        share = share * valid_PNC[:, :, None, :]
    within, from_start = products(momentum_PNC), momentum_PNC[..., None].exp()
    return Coefficients(share @ within, weights, share @ from_start, within[..., -1, :, None], from_start[..., -1:, :])


def loss_gradient(weights: Weights, key_NCK: Tensor, value_NCK: Tensor, activation: str) -> tuple[list, list]:
    """∇ℓ of every token in closed form: of layer l it is the outer product of the l-th entries.

    Returns the inputs a of the layers, each (N, C, I), and the gradients δ of their outputs, each (N, C, O).
    """
    act, act_backward = ACTIVATIONS[activation]
    entering, output = [key_NCK], key_NCK @ weights[0]
    outputs = [output]
    for weight in weights[1:]:
        entering.append(act(output))
        output = entering[-1] @ weight
        outputs.append(output)
    leaving = [2 * (output - value_NCK)]
    for weight, before in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
        leaving.append(act_backward(leaving[-1] @ weight.transpose(1, 2), before))
    return entering, leaving[::-1]


def gradient_norm(entering: list[Tensor], leaving: list[Tensor]) -> Tensor:
    """‖u‖ over all layers, (N, C): an outer product's norm is the product of the norms."""
    layers = [a.norm(dim=-1) * delta.norm(dim=-1) for a, delta in zip(entering, leaving, strict=True)]
    return torch.stack(layers).norm(dim=0)


def _read(
    weights: Weights,
    momentum: Weights,
    query_NCK: Tensor,
    entering: list[Tensor],
    leaving: list[Tensor],
    own: Coefficients,
    activation: str,
) -> Tensor:
    """y_t = M_t(q_t) of one chunk; ``leaving`` with θ in it."""
    inputs = query_NCK
    for layer, (weight, a_NCI, step_NCO) in enumerate(zip(weights, entering, leaving, strict=True)):
        if layer:
            inputs = ACTIVATIONS[activation][0](inputs)
        output = inputs @ weight
        if own.weights_PNC1 is not None:
            output = output * own.weights_PNC1
        if momentum:
            output = torch.addcmul(output, inputs @ momentum[layer], own.momentum_PNC1)
        scores_NCC = (inputs @ a_NCI.transpose(1, 2)) * own.share_PNCC
        inputs = torch.baddbmm(output, scores_NCC, step_NCO, alpha=-1)
    return inputs


def _learn(
    weights: Weights, momentum: Weights, entering: list[Tensor], leaving: list[Tensor], own: Coefficients
) -> tuple[Weights, Weights]:
    """M and S after a chunk."""
    share_NC1 = own.share_PNCC[:, -1, :, None]
    new_weights, new_momentum = [], []
    for layer, (weight, a_NCI, step_NCO) in enumerate(zip(weights, entering, leaving, strict=True)):
        a_NIC = a_NCI.transpose(1, 2)
        if own.weights_PNC1 is not None:
            weight = weight * own.weights_PNC1[:, -1:]
        if momentum:
            weight = torch.addcmul(weight, momentum[layer], own.momentum_PNC1[:, -1:])
            kept = momentum[layer] * own.kept_PN11
            new_momentum.append(torch.baddbmm(kept, a_NIC, step_NCO * own.carried_PNC1, alpha=-1))
        new_weights.append(torch.baddbmm(weight, a_NIC, step_NCO * share_NC1, alpha=-1))
    return tuple(new_weights), tuple(new_momentum)


def _columns(states_BHT: Tensor, chunks: Chunks) -> Tensor:
    """(B, H, T, …) to (N, P, C, …), 0 at columns without a token."""
    states = chunks.take(states_BHT, 2)
    if chunks.valid_RPC is not None:
        valid = chunks.valid_RPC[:, None]
        states = states.masked_fill(~(valid if states.dim() == 4 else valid[..., None]), 0.0)
    return states.flatten(0, 1)


def _flat(part: Weights) -> Weights:
    return tuple(each.flatten(0, 1) for each in part)


def _where(condition: Tensor, new: Weights, old: Weights) -> Weights:
    return tuple(torch.where(condition, a, b) for a, b in zip(new, old, strict=True))


def _open(opens: bool | Tensor, weights: Weights, anchor: Weights, heads: int) -> Weights:
    """The weights at which a chunk takes its gradients: those of now in rows that begin one."""
    if isinstance(opens, bool):
        return weights if opens else anchor
    return _where(opens.repeat_interleave(heads)[:, None, None], weights, anchor)
