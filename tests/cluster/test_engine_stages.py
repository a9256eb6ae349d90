"""Parts that wait, and batches that change size, at every ZeRO stage: what a plain PyTorch loop does."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor, nn

from cluster.parameter_groups import SPLITS, parameter_groups
from tests.jobs.workers import run_together

PATTERNS = (r"layers\.0\.", "embed")
# Which patterns wait, the rows of a backward pass, and how many of these make a step; three steps of each.
PLAN = [((), 4, 1), ((0,), 4, 1), ((0, 1), 2, 2), ((1,), 2, 4), ((), 8, 1)]
RATE, CLIP, DECAY, BETAS = 1e-2, 0.5, 0.1, (0.9, 0.95)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        return (hidden.sum(-1) - y).square().mean()


class PlainLoop:
    """One process, PyTorch's own AdamW, groups taken out by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.net, DECAY, (), PATTERNS), lr=RATE, betas=BETAS, eps=1e-8
        )

    def step(self, waiting: tuple[int, ...], x: Tensor, y: Tensor) -> float:
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not any(re.search(PATTERNS[number], name) for number in waiting))
        self.net(x, y).backward()
        learning = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        norm = float(nn.utils.clip_grad_norm_(learning, CLIP))
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [group for group in groups if not set(waiting) & set(group[SPLITS])]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        self.optimizer.zero_grad()
        return norm


def learn(rank: int, zero_stage: int) -> tuple[float, float]:
    """The largest difference of a weight at the end, and of a gradient's norm on the way."""
    from cluster.engine import Engine, EngineSettings

    torch.manual_seed(0)
    settings = EngineSettings(zero_stage, "fp32", 4, 1, CLIP, RATE, BETAS, 1e-8, DECAY, freezable=PATTERNS)
    engine, plain = Engine(Net(), settings), PlainLoop()
    generator, norms = torch.Generator().manual_seed(1), []
    for waiting, rows, passes in PLAN:
        engine.freeze([PATTERNS[number] for number in waiting])
        engine.set_batch(rows, passes)
        for _ in range(3):
            x = torch.randint(11, (2 * rows * passes, 3), generator=generator)
            y = torch.randn(2 * rows * passes, 3, generator=generator)
            for first in range(rank * rows * passes, (rank + 1) * rows * passes, rows):
                engine.backward(engine.forward(x=x[first : first + rows], y=y[first : first + rows]))
                engine.step(RATE)
            norms.append(abs(engine.gradient_norm - plain.step(waiting, x, y)))
    assert "torch._inductor.compile_fx" not in sys.modules, "DeepSpeed has loaded a compiler that nothing needs"
    own = dict(plain.net.named_parameters())
    weights = [float((tensor - own[name].detach()).abs().max()) for name, tensor in engine.named_full_tensors()]
    return max(weights), max(norms)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_waits_keeps_weights_moments_and_steps(zero_stage):
    for weights, norms in run_together(2, learn, zero_stage):
        assert weights < 1e-6 and norms < 2e-5
