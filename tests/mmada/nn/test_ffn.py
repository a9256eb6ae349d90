"""The dense feed-forward against transformers' Llama and Gemma, values and gradients."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from mmada.config import MMaDAConfig
from mmada.nn.ffn import FeedForward

D, F = 96, 40


@pytest.mark.parametrize(
    ("hidden_act", "oracle"),
    [
        ("silu", lambda: LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=F))),
        (
            "gelu_pytorch_tanh",
            lambda: GemmaMLP(GemmaConfig(hidden_size=D, intermediate_size=F, hidden_act="gelu_pytorch_tanh")),
        ),
    ],
)
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_equals_the_oracle_by_value_and_gradient(hidden_act, oracle, tokens):
    torch.manual_seed(tokens)
    theirs = oracle().double()
    ours = FeedForward(MMaDAConfig(hidden_size=D, intermediate_size=F, hidden_act=hidden_act)).double()
    ours.load_state_dict(theirs.state_dict())
    states = torch.randn(2, tokens, D, dtype=torch.float64)
    direction = torch.randn_like(states)
    results = []
    for block in (ours, theirs):
        own = states.clone().requires_grad_()
        output = block(own)
        (output * direction).sum().backward()
        results.append([output, own.grad, *(p.grad for _, p in sorted(block.named_parameters()))])
    for mine, oracles in zip(*results, strict=True):
        assert_close(mine, oracles, rtol=1e-6, atol=1e-9)


def test_another_width_can_be_given():
    block = FeedForward(MMaDAConfig(hidden_size=D, intermediate_size=F), intermediate_size=7)
    assert block.down_proj.weight.shape == (D, 7)
