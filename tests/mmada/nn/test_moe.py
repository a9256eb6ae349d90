"""The mixture of experts against transformers' Mixtral and Qwen3-MoE blocks, values and gradients."""

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mmada.config import MMaDAConfig
from mmada.nn.moe import MoE

D, F, E, K = 24, 40, 6, 2


def mixtral():
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    return MixtralSparseMoeBlock(config), True


def qwen(norm):
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm
    )
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config), norm


@pytest.mark.parametrize(
    "make", [mixtral, lambda: qwen(True), lambda: qwen(False)], ids=["mixtral", "qwen", "qwen-raw"]
)
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_equals_the_oracle_by_value_and_gradient(make, tokens):
    torch.manual_seed(tokens)
    theirs, norm = make()
    theirs = theirs.double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = MoE(
        MMaDAConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K, norm_topk_prob=norm)
    ).double()
    ours.load_state_dict(theirs.state_dict())
    states = torch.randn(1, tokens, D, dtype=torch.float64)
    direction = torch.randn_like(states)
    results = []
    for block in (ours, theirs):
        own = states.clone().requires_grad_()
        output = block(own)
        output = output[0] if isinstance(output, tuple) else output
        (output * direction).sum().backward()
        results.append([output, own.grad] + [p.grad for _, p in sorted(block.named_parameters())])
    for mine, oracles in zip(*results, strict=True):
        # The oracles take the softmax in float32, so they are only that exact.
        assert_close(mine, oracles, rtol=1e-4, atol=1e-5)


def test_equals_its_own_formula_in_float64():
    torch.manual_seed(0)
    block = MoE(MMaDAConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K)).double()
    states = torch.randn(1, 31, D, dtype=torch.float64)
    scores = (states[0] @ block.gate.weight.T).softmax(-1)
    expected = torch.zeros(31, D, dtype=torch.float64)
    for t in range(31):
        chosen = scores[t].argsort(descending=True)[:K]
        for e in chosen:
            gate, up = (block.experts.gate_up_proj[e] @ states[0, t]).chunk(2)
            hidden = gate * torch.sigmoid(gate) * up
            expected[t] += scores[t, e] / scores[t, chosen].sum() * (block.experts.down_proj[e] @ hidden)
    assert_close(block(states)[0], expected, rtol=1e-6, atol=1e-9)
