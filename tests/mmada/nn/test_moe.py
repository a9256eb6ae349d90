"""The mixture of experts against transformers' Mixtral and Qwen3-MoE blocks, values and gradients."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DeepseekV2Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM, MMaDAModel, count_parameters
from mmada.nn.moe import MoE
from mmada.presets import build_config
from tests.mmada.nn.layers import make_context

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


@pytest.mark.parametrize("num_shared", [1, 2])
def test_shared_experts_equal_deepseeks_by_value_and_gradient(num_shared):
    """The whole block with a mixer that adds nothing: x + experts(norm x) + shared experts(norm x)."""
    torch.manual_seed(num_shared)
    theirs = DeepseekV2Moe(
        DeepseekV2Config(
            hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=K,
            n_shared_experts=num_shared, num_attention_heads=4,
            routed_scaling_factor=1.0, topk_method="greedy", hidden_act="silu",
        )
    )  # fmt: skip
    theirs = theirs.double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = MMaDAConfig(
        hidden_size=D, num_attention_heads=4, num_hidden_layers=1, moe_intermediate_size=F, num_experts=E,
        num_experts_per_tok=K, num_shared_experts=num_shared, norm_topk_prob=False, router_noise=False,
    )  # fmt: skip
    block = MMaDAModel(config).layers[0].double()
    torch.nn.init.zeros_(block.mixer.o_proj.weight)
    weights = theirs.state_dict()
    block.shared_experts.load_state_dict({n.partition(".")[2]: w for n, w in weights.items() if "shared" in n})
    block.mlp.load_state_dict({n: w for n, w in weights.items() if "shared" not in n})
    states = torch.randn(2, 31, D, dtype=torch.float64)
    direction = torch.randn_like(states)
    context = make_context(config, 2, 31)
    results = []
    for call in (lambda x: block(x, context)[0], lambda x: x + theirs(block.post_attention_layernorm(x))):
        own = states.clone().requires_grad_()
        output = call(own)
        (output * direction).sum().backward()
        results.append([output, own.grad])
    mine, oracles = dict(block.shared_experts.named_parameters()), dict(theirs.shared_experts.named_parameters())
    for name, parameter in oracles.items():
        assert_close(mine[name].grad, parameter.grad, rtol=1e-6, atol=1e-9)
    for ours, oracle in zip(*results, strict=True):
        assert_close(ours, oracle, rtol=1e-4, atol=1e-5)  # their router takes the softmax in float32


def test_active_parameters_leave_out_the_idle_experts_and_nothing_else():
    """debug: width 64, one expert layer, 2 of 4 experts of width 64; shared experts and their attention always run."""
    plain = count_parameters(build_config("debug"))
    total, active = count_parameters(build_config("debug", num_shared_experts=3, cross_expert_attention=True))
    added = 3 * 3 * 64 * 64 + 4 * 64 * 64 + 2 * 64
    assert (total - plain[0], active - plain[1]) == (added, added)
    assert total - active == 2 * 3 * 64 * 64


def test_what_stands_beside_the_experts_is_saved_and_loaded(tmp_path):
    """Zero projections and other starting values must not come over what was learned."""
    torch.manual_seed(0)
    config = build_config(
        "debug", num_shared_experts=1, cross_expert_attention=True, token_mask_probability=0.1, initializer_range=0.2
    )
    model = MMaDAForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.layers[1].cross_experts.o_proj.weight, std=0.2)
    model.save_pretrained(tmp_path)
    loaded, tokens = MMaDAForCausalLM.from_pretrained(tmp_path), torch.arange(8, 20)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.model.input_noise.mask_embedding, model.model.input_noise.mask_embedding)
