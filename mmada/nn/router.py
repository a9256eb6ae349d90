"""Routing: how experts are chosen, the noise in training, and what is recorded about it.

# B batch, T tokens, D model, E experts, K chosen experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmada.config import MMaDAConfig
from mmada.nn.sparsemax import sparsemax


def choose_experts(
    logits_TE: Tensor,
    top_k: int,
    *,
    normalise: bool = True,
    selection_bias: Tensor | None = None,
    normalizer: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Weights (T, K) and indices (T, K) of the chosen experts; softmax in float32 at least.

    ``selection_bias`` (E,) shifts the choice and not the weights (loss-free balancing, arXiv:2408.15664).
    ``normalizer="sparsemax"`` (arXiv:1602.02068) leaves the choice as it is and takes the sparsemax of the chosen
    logits for the weights, as softmax renormalised over the chosen is the softmax of their logits. Where at most K
    experts have a share in the sparsemax over all, these are their shares (without a selection bias, which may
    choose others); a chosen expert may weigh exactly 0. Without ``normalise``: the shares in the sparsemax over all.
    """
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = logits_TE.softmax(dim=-1)
    choice_TE = scores_TE if selection_bias is None else scores_TE + selection_bias
    index_TK = choice_TE.topk(top_k, dim=-1).indices
    if normalizer == "sparsemax":
        if normalise:
            return sparsemax(logits_TE.gather(-1, index_TK), dim=-1), index_TK
        return sparsemax(logits_TE, dim=-1).gather(-1, index_TK), index_TK
    weights_TK = scores_TE.gather(-1, index_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, index_TK


def counter_normal(keys_T: Tensor, num: int, stream: int) -> Tensor:
    """Standard normal numbers (T, num) that are a pure function of (key, column, stream).

    The noise of a token thus does not depend on the worker it lands on, on the micro batch, or on how often the
    forward pass is repeated by gradient checkpointing. splitmix64 on int64 (which wraps), then Box-Muller.
    """
    bits = _counter_bits(keys_T, num, stream)
    return (-2 * _uniform(bits >> 40).log()).sqrt() * (2 * torch.pi * _uniform(bits >> 16)).cos()


def counter_uniform(keys_T: Tensor, num: int, stream: int) -> Tensor:
    """Numbers (T, num) even over (0, 1), a pure function of (key, column, stream) as in ``counter_normal``."""
    return _uniform(_counter_bits(keys_T, num, stream) >> 40)


def _counter_bits(keys_T: Tensor, num: int, stream: int) -> Tensor:
    column = torch.arange(num, dtype=torch.int64, device=keys_T.device)
    return mix64(mix64(keys_T + stream * 0x9E3779B97F4A7C1)[:, None] + column)


def _uniform(bits: Tensor) -> Tensor:
    """The lowest 24 bits as a float32 in (0, 1)."""
    return ((bits & 0xFFFFFF).float() + 0.5) / 2**24


def mix64(x: Tensor) -> Tensor:
    """Spread the bits of int64 numbers, one to one: splitmix64; ``&`` after ``>>`` makes the shifts logical."""
    x = x + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def gate_of(mlp: nn.Module) -> nn.Module:
    """The linear gate of an expert block, ours (``gate``) or the one an engine put in its place (``router.gate``)."""
    return mlp.get_submodule("router.gate" if hasattr(mlp, "router") else "gate")


def selection_bias_of(mlp: nn.Module) -> Tensor | None:
    """The loss-free balancing bias (E,) of an expert block, wherever an engine moved it; None without one."""
    owner: Any = mlp.router if hasattr(mlp, "router") else mlp.gate
    if hasattr(owner, "get_base_layer"):  # an adapter around the gate
        owner = owner.get_base_layer()
    return getattr(owner, "e_score_correction_bias", None)


class RouterTap(nn.Module):
    """Sits beside an expert block and hangs on its gate: adds the learned noise, keeps the logits.

    H = x W_g + ε · softplus(x W_n), ε ~ N(0, 1) (Shazeer et al. 2017, arXiv:1701.06538), W_n zero at the start.
    Being outside the block it survives when an expert-parallel engine swaps the block; it finds the gate again.
    """

    def __init__(self, config: MMaDAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.noise_scale = layer_idx, config.router_noise_scale
        self.noise_weight: nn.Parameter | None = None
        if config.router_noise:
            self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self._watched: nn.Module | None = None
        self._noise_keys_T: Tensor | None = None
        self._logits_TE: Tensor | None = None

    def run(self, mlp: nn.Module, hidden_states: Tensor, noise_keys_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the expert block with the tap open: its output (B, T, D) and the router's logits (T, E), float32."""
        return self._listen(mlp, mlp, hidden_states, noise_keys_T)

    def run_gate(self, mlp: nn.Module, flat_TD: Tensor, noise_keys_T: Tensor | None) -> Tensor:
        """Run only the gate of the expert block with the tap open: the router's logits (T, E), float32."""
        # The gate's output, not what was noted on the way to it: engines that shard parameters gather the gate's
        # weight for the backward pass when a gradient comes by at the output.
        return self._listen(mlp, gate_of(mlp), flat_TD, noise_keys_T)[0]

    def forward(self, flat_TD: Tensor, logits_TE: Tensor) -> Tensor:
        """Logits with this step's noise, in training; as they are otherwise. Called by the hook on the gate."""
        if self.noise_weight is None or self._noise_keys_T is None:
            return logits_TE
        spread_TE = F.softplus(F.linear(flat_TD.to(logits_TE.dtype), self.noise_weight.to(logits_TE.dtype)))
        noise_TE = counter_normal(self._noise_keys_T, logits_TE.shape[-1], self.layer_idx)
        return logits_TE + self.noise_scale * noise_TE.to(logits_TE.dtype) * spread_TE

    def _listen(
        self, mlp: nn.Module, called: nn.Module, hidden_states: Tensor, noise_keys_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output of the called module, and the logits that the block's gate gave meanwhile."""
        self._watch(gate_of(mlp))
        self._noise_keys_T = noise_keys_T
        try:
            output = called(hidden_states)
            logits_TE = self._logits_TE
        finally:
            self._noise_keys_T = self._logits_TE = None
        assert logits_TE is not None, "the expert block did not call its gate"
        return output, logits_TE

    def _watch(self, gate: nn.Module) -> None:
        if self.__dict__["_watched"] is not gate:
            # Before the hooks of engines that free gathered weights after the forward pass. A bound method, so that
            # a deep copy of the model is watched by its own taps.
            gate.register_forward_hook(self._on_gate, prepend=True)
            self.__dict__["_watched"] = gate  # not a submodule: the gate belongs to the expert block

    def _on_gate(self, gate: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.dtype in (torch.float16, torch.bfloat16):  # an engine's gate, and the router decides in float32
            output = F.linear(args[0].float(), gate.weight.float())
        self._logits_TE = self(args[0], output)
        return self._logits_TE
