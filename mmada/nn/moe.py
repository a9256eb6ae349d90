"""The mixture of experts: a router, and the experts that it chooses.

The layout (a ``gate`` with a weight of (E, D), ``experts`` with fused ``gate_up_proj`` and ``down_proj``) is what
expert-parallel engines recognise; such an engine puts its own layer in this one's place, and what must live on
(noise, the record of the logits) therefore hangs on the gate from outside: see ``mmada.nn.router.RouterTap``.

# B batch, T tokens, D model, E experts, K chosen experts
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmada.config import MMaDAConfig
from mmada.nn.experts import Experts
from mmada.nn.router import choose_experts


class Gate(nn.Linear):
    """Router logits x Wᵀ, (T, D) to (T, E).

    With loss-free balancing it carries the buffer ``e_score_correction_bias`` (E,), float32: it is added when
    experts are chosen and left out of their weights (arXiv:2408.15664).
    """

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        if config.router_bias_update_rate > 0:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))


class MoE(nn.Module):
    """Each token goes to its K best experts, whatever their load (dropless); (B, T, D) to (B, T, D)."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Gate(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights_TK, index_TK = choose_experts(
            self.gate(flat_TD),
            self.top_k,
            normalise=self.norm_topk_prob,
            selection_bias=getattr(self.gate, "e_score_correction_bias", None),
        )
        return self.experts(flat_TD, index_TK, weights_TK.to(flat_TD.dtype)).view_as(hidden_states)
