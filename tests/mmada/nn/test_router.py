"""Routing: the choice of experts, the noise, and the tap beside an expert block."""

import copy

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.nn.moe import MoE
from mmada.nn.router import RouterTap, choose_experts, counter_normal

CONFIG = MMaDAConfig(
    hidden_size=16, num_attention_heads=2, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2
)


def test_weights_are_the_renormalised_probabilities_of_the_best():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.float64)
    weights, index = choose_experts(logits, 2)
    assert index.tolist() == [[1, 2]]
    e = torch.tensor([3.0, 2.0], dtype=torch.float64).exp()
    assert_close(weights[0], e / e.sum())
    raw, _ = choose_experts(logits, 2, normalise=False)
    assert_close(raw[0], logits.softmax(-1)[0, [1, 2]])


def test_selection_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    bias = torch.tensor([1.0, 0.0, -1.0, 0.0])
    weights, index = choose_experts(logits, 2, normalise=False, selection_bias=bias)
    assert sorted(index[0].tolist()) == [0, 1]
    assert_close(weights, logits.softmax(-1).gather(-1, index))


def test_sparsemax_weights():
    """Golden vector, and: the sparsemax over all where it fits into the chosen, else the one of the chosen alone."""
    logits = torch.tensor([[1.2, 0.8, -0.5, 0.1]], dtype=torch.float64)
    for normalise in (True, False):
        weights, index = choose_experts(logits, 3, normalise=normalise, normalizer="sparsemax")
        assert index.tolist() == [[0, 1, 3]]
        assert_close(weights, torch.tensor([[0.7, 0.3, 0.0]], dtype=torch.float64))
    dense = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)  # all three have a share: .233333, .333333, .433333
    weights, index = choose_experts(dense, 2, normalizer="sparsemax")
    assert index.tolist() == [[2, 1]]
    assert_close(weights, torch.tensor([[0.55, 0.45]], dtype=torch.float64))
    raw, _ = choose_experts(dense, 2, normalise=False, normalizer="sparsemax")
    assert_close(raw, torch.tensor([[1.3, 1.0]], dtype=torch.float64) / 3)


def test_sparsemax_weighs_what_softmax_chooses():
    """With a selection bias, too: the load that balancing counts is then right for both."""
    logits, bias = torch.randn(50, 6, dtype=torch.float64), torch.randn(6) / 4
    soft = choose_experts(logits, 3, selection_bias=bias)
    sparse = choose_experts(logits, 3, selection_bias=bias, normalizer="sparsemax")
    assert torch.equal(soft[1], sparse[1])
    assert_close(sparse[0].sum(-1), torch.ones(50, dtype=torch.float64))
    assert (sparse[0] >= 0).all() and not torch.equal(soft[0], sparse[0])


def test_counter_normal_is_standard_normal_and_a_pure_function_of_its_key():
    keys = torch.arange(50_000) * 2**24
    sample = counter_normal(keys, 4, stream=3)
    assert stats.kstest(sample.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(torch.cat([sample.T, counter_normal(keys, 4, stream=4).T]))
    assert (correlation - torch.eye(8)).abs().max() < 0.02
    picked = torch.tensor([17, 4, 4999])
    assert torch.equal(counter_normal(keys[picked], 4, stream=3), sample[picked])


def test_the_tap_adds_learned_noise_to_the_gates_logits():
    torch.manual_seed(0)
    block, tap = MoE(CONFIG), RouterTap(CONFIG, layer_idx=1)
    nn.init.normal_(tap.noise_weight)
    states, keys = torch.randn(1, 5, 16), torch.arange(5)
    _, logits = tap.run(block, states, keys)
    spread = nn.functional.softplus(states[0] @ tap.noise_weight.T)
    assert_close(logits, states[0] @ block.gate.weight.T + counter_normal(keys, 4, stream=1) * spread)
    _, still = tap.run(block, states, None)
    assert_close(still, states[0] @ block.gate.weight.T)


def test_the_tap_follows_a_gate_that_was_swapped():
    """What an expert-parallel engine does: another block whose gate lies at ``router.gate``."""
    torch.manual_seed(0)

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(16, 4, bias=False)

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router()

        def forward(self, states):
            return self.router.gate(states.flatten(0, 1)).sum() + states

    block, swapped, tap = MoE(CONFIG), Swapped(), RouterTap(CONFIG, layer_idx=0)
    states = torch.randn(1, 3, 16)
    tap.run(block, states, None)
    _, logits = tap.run(swapped, states, None)
    assert_close(logits, states[0] @ swapped.router.gate.weight.T)


def test_a_deep_copy_is_watched_by_its_own_tap():
    model = nn.ModuleDict({"block": MoE(CONFIG), "tap": RouterTap(CONFIG, layer_idx=0)})
    states = torch.randn(1, 3, 16)
    model["tap"].run(model["block"], states, None)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin["block"].gate.weight)
    _, logits = twin["tap"].run(twin["block"], states, None)
    assert logits.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_in_float32(dtype):
    torch.manual_seed(0)
    block, tap = MoE(CONFIG).to(dtype), RouterTap(CONFIG, layer_idx=0).to(dtype)
    states = torch.randn(1, 9, 16).to(dtype)
    _, logits = tap.run(block, states, None)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, states[0].float() @ block.gate.weight.float().T)
