"""The dense feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from mmada.config import MMaDAConfig

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """down(act(gate x) * up x), (..., D) to (..., D) (GLU variants, arXiv:2002.05202).

    SwiGLU with ``hidden_act="silu"``, as in Llama; GeGLU with ``"gelu_pytorch_tanh"``, as in Gemma.
    ``intermediate_size`` is the config's unless given.
    """

    def __init__(self, config: MMaDAConfig, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = config.intermediate_size if intermediate_size is None else intermediate_size
        self.act_fn = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
