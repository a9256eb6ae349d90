"""Attention among a token's experts, and the block around it: with our experts and with an engine's in their place."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.model import MMaDAModel
from mmada.nn.cross_expert import CrossExpertAttention, blend
from mmada.nn.router import choose_experts
from tests.mmada.nn.layers import make_context

D, HEADS, E, K = 24, 4, 5, 3
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def make_block(dtype=torch.float64, open_gate=True, seed=0, **overrides):
    """One expert block as a model initialises it; ``open_gate`` moves the zero projections away from zero."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": 1, "moe_intermediate_size": 20,
        "num_experts": E, "num_experts_per_tok": K, "cross_expert_attention": True, "cross_expert_heads": HEADS,
        "initializer_range": 0.3,
    }  # fmt: skip
    config = MMaDAConfig(**settings | overrides)
    block = MMaDAModel(config).layers[0].to(dtype)
    if open_gate and block.cross_experts is not None:
        nn.init.normal_(block.cross_experts.o_proj.weight, std=0.3)
    return block


def run(block, states, keys=None):
    return block(states, make_context(block.mixer.config, *states.shape[:2], states.dtype), keys)


class Router(nn.Module):
    """Answers as DeepSpeed's router does: weights, experts, and how many tokens each expert got."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.top_k = gate, K
        self.e_score_correction_bias = gate.e_score_correction_bias

    def forward(self, flat, expert_bias=None):
        weights, index = choose_experts(self.gate(flat), self.top_k, selection_bias=self.e_score_correction_bias)
        return weights, index, torch.bincount(index.flatten(), minlength=E).int()


class EngineBlock(nn.Module):
    """What an expert-parallel engine puts in our block's place, reduced to the names that we rely on."""

    def __init__(self, ours):
        super().__init__()
        self.num_experts, self.top_k, self.experts = E, K, ours.experts
        self.router = Router(ours.gate)

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        weights, index, counts = self.router(flat, None)
        assert counts.tolist() == torch.bincount(index.flatten(), minlength=E).tolist()
        assert index.shape == (flat.shape[0], self.top_k)
        return self.experts(flat, index, weights).view_as(hidden)


@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_equals_multihead_attention_by_value_and_gradient(tokens):
    torch.manual_seed(tokens)
    ours = CrossExpertAttention(D, HEADS).double()
    theirs = nn.MultiheadAttention(D, HEADS, bias=False, batch_first=True).double()
    norm = nn.LayerNorm(D).double()
    for p in (*ours.parameters(),):
        nn.init.normal_(p)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        norm.load_state_dict(ours.norm.state_dict())
    outputs = torch.randn(tokens, K, D, dtype=torch.float64)
    direction = torch.randn_like(outputs)

    def oracle(z):
        normed = norm(z)
        return z + theirs(normed, normed, normed, need_weights=False)[0]

    results = []
    for call in (ours, oracle):
        own = outputs.clone().requires_grad_()
        mixed = call(own)
        (mixed * direction).sum().backward()
        results.append([mixed, own.grad])
    parts = [p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
    results[0] += [torch.cat(parts), ours.o_proj.weight.grad, ours.norm.weight.grad, ours.norm.bias.grad]
    results[1] += [theirs.in_proj_weight.grad, theirs.out_proj.weight.grad, norm.weight.grad, norm.bias.grad]
    for mine, oracles in zip(*results, strict=True):
        assert_close(mine, oracles, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_starts_as_the_plain_mixture(dtype):
    """Bit for bit in float64. In float32 the plain block's sum over the experts is fused, so it rounds once less."""
    block, plain = make_block(dtype, open_gate=False), make_block(dtype, cross_expert_attention=False)
    plain.load_state_dict(block.state_dict(), strict=False)
    states = torch.randn(2, 31, D, dtype=dtype)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for mine, theirs in zip(run(block, states), run(plain, states), strict=True):
        assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_equals_a_loop_over_tokens(normalizer):
    block = make_block(router_normalizer=normalizer, norm_topk_prob=False)
    nn.init.zeros_(block.mixer.o_proj.weight)
    states = torch.randn(1, 17, D, dtype=torch.float64)
    normed = block.post_attention_layernorm(states)[0]
    weights, index = choose_experts(block.mlp.gate(normed), K, normalise=False, normalizer=normalizer)
    expected = []
    for x, w, chosen in zip(normed, weights, index, strict=True):
        found = []
        for e in chosen:
            gate, up = (block.mlp.experts.gate_up_proj[e] @ x).chunk(2)
            found.append(block.mlp.experts.down_proj[e] @ (F.silu(gate) * up))
        expected.append((w[:, None] * block.cross_experts(torch.stack(found))).sum(0))
    assert_close(run(block, states)[0], states + torch.stack(expected), **EXACT)


@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_survives_the_swap_of_the_expert_block(cross, normalizer):
    """Same output, logits and gradients; the gate is called once, and what was covered for a call shows again."""
    torch.manual_seed(1)
    states, keys = torch.randn(2, 9, D, dtype=torch.float64), torch.arange(18)
    direction, calls = torch.randn_like(states), []
    results = []
    for swapped in (False, True):
        block = make_block(cross_expert_attention=cross, router_normalizer=normalizer, router_bias_update_rate=0.1)
        nn.init.normal_(block.router_tap.noise_weight, std=0.3)
        nn.init.normal_(block.mlp.gate.e_score_correction_bias)
        parameters = [p for _, p in sorted(block.named_parameters())]
        if swapped:
            block.mlp = EngineBlock(block.mlp)
            block.mlp.router.gate.register_forward_hook(lambda *_: calls.append(1))
        own = states.clone().requires_grad_()
        output, logits = run(block, own, keys)
        ((output * direction).sum() + logits.square().sum()).backward()
        results.append([output, logits, own.grad, *(p.grad for p in parameters)])
    assert len(calls) == 1
    assert block.mlp.top_k == K and "forward" not in vars(block.mlp.router)
    for mine, theirs in zip(*results, strict=True):
        assert mine.abs().max() > 0
        assert_close(mine, theirs, **EXACT)


def test_what_is_covered_shows_again_after_an_error():
    block = make_block(router_bias_update_rate=0.1)
    block.mlp = EngineBlock(block.mlp)
    block.mlp.experts.forward = None  # not callable
    with pytest.raises(TypeError):
        run(block, torch.randn(1, 3, D, dtype=torch.float64))
    assert block.mlp.top_k == K and "forward" not in vars(block.mlp.router)


def test_an_expert_that_nobody_chose_is_not_run():
    block = make_block(num_experts_per_tok=2)
    states = torch.randn(1, 1, D, dtype=torch.float64)
    _, logits = run(block, states)
    with torch.no_grad():
        for expert in logits[0].argsort(descending=True)[2:]:
            block.mlp.experts.gate_up_proj[expert] = torch.nan
    assert torch.isfinite(run(block, states)[0]).all()


def test_experts_have_no_order():
    torch.manual_seed(0)
    block = CrossExpertAttention(D, HEADS).double()
    nn.init.normal_(block.o_proj.weight)
    outputs, order = torch.randn(7, 4, D, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    assert_close(block(outputs[:, order]), block(outputs)[:, order], **EXACT)


def test_blending_sums_in_float32():
    outputs = torch.full((1, 256, 1), 1.0, dtype=torch.bfloat16)
    assert blend(outputs, torch.full((1, 256), 1 / 256)).item() == 1.0


def test_every_parameter_is_trained_once_the_gate_is_open():
    block = make_block(num_shared_experts=1, router_normalizer="sparsemax", router_noise=False)
    run(block, torch.randn(2, 31, D, dtype=torch.float64))[0].square().sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_in_the_models_dtype(dtype):
    exact, block = make_block(num_shared_experts=1, initializer_range=0.1), make_block(dtype, num_shared_experts=1)
    block.load_state_dict(exact.state_dict())
    exact.load_state_dict(block.state_dict())
    states = torch.randn(1, 8, D, dtype=dtype)
    output, logits = run(block, states)
    assert (output.dtype, logits.dtype) == (dtype, torch.float32)
    assert_close(
        output.double(), run(exact, states.double())[0], rtol=0.1, atol=0.05 if dtype == torch.bfloat16 else 1e-5
    )


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=5 does not divide hidden_size=24"):
        CrossExpertAttention(D, 5)
