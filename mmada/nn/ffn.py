"""The dense feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from mmada.config import MMaDAConfig


class SwiGLU(nn.Module):
    """down(SiLU(gate x) * up x) (GLU variants, arXiv:2002.05202); (..., D) to (..., D)."""

    def __init__(self, config: MMaDAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
