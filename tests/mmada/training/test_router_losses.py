"""Balance loss and z-loss against transformers, and against worked examples."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from mmada.training.objectives.router import (
    balance_loss,
    expert_load,
    expert_use,
    importance,
    router_losses,
    smooth_load,
    source_balance,
    squared_coefficient_of_variation,
    z_loss,
)


@pytest.mark.parametrize("tokens", [1, 63, 100])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_equals_mixtrals_by_value_and_gradient(tokens, top_k):
    logits = torch.randn(tokens, 6, dtype=torch.float64)
    results = []
    for loss_of in (
        lambda z: balance_loss(z, expert_load(z, top_k).double(), tokens),
        lambda z: load_balancing_loss_func((z,), num_experts=6, top_k=top_k),
    ):
        own = logits.clone().requires_grad_()
        loss = loss_of(own)
        loss.backward()
        results.append((loss.double(), own.grad))
    # The oracle adds probabilities up in float32.
    assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_z_loss_equals_switch_transformers_by_value_and_gradient():
    logits = torch.randn(1, 50, 6, dtype=torch.float64)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    assert_close(z_loss(ours[0]), router_z_loss_func(theirs), rtol=1e-6, atol=1e-9)
    z_loss(ours[0]).backward()
    router_z_loss_func(theirs).backward()
    assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_are_those_of_finite_differences(top_k):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    load = expert_load(logits, top_k).double()
    assert torch.autograd.gradcheck(lambda z: balance_loss(z, load, 12), [logits])
    assert torch.autograd.gradcheck(z_loss, [logits])


def test_golden_values():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]).double()
    load = expert_load(probabilities.log(), 1)
    assert load.tolist() == [2, 1, 1]
    assert_close(balance_loss(probabilities.log(), load, 4).item(), 1.05, rtol=0, atol=1e-6)
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(z_loss(logits).item(), 3.501758, rtol=0, atol=1e-6)
    assert_close(squared_coefficient_of_variation(torch.tensor([0.5, 0.25, 0.25])).item(), 0.125, rtol=0, atol=1e-6)
    clean = torch.tensor([[0.5, 0.2, -0.1]], dtype=torch.float64)
    noisy = torch.tensor([[0.6, 0.1, 0.0]], dtype=torch.float64)
    expected = torch.tensor([0.908789, 0.091211, 0.009815], dtype=torch.float64)
    assert_close(smooth_load(clean, noisy, torch.full_like(clean, 0.3), 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smooth_load_is_the_chance_of_being_chosen_when_the_own_noise_is_drawn_anew(top_k):
    torch.manual_seed(top_k)
    clean, spread = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64) + 0.2
    noisy = clean + spread * torch.randn_like(clean)
    chances = torch.zeros(5, dtype=torch.float64)
    for token in range(3):
        for expert in range(5):
            own = clean[token, expert] + spread[token, expert] * torch.randn(40_000, dtype=torch.float64)
            others = torch.cat([noisy[token, :expert], noisy[token, expert + 1 :]])
            chances[expert] += (own > others.sort(descending=True).values[top_k - 1]).double().mean()
    assert_close(smooth_load(clean, noisy, spread, top_k), chances, rtol=0, atol=0.02)
    assert smooth_load(clean, noisy, spread, 5).tolist() == [3.0] * 5


def test_smooth_load_teaches_logits_and_spread():
    clean, spread = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4, dtype=torch.float64) + 0.2
    noise = torch.randn_like(clean)
    inputs = clean.requires_grad_(), spread.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, s: smooth_load(c, c + s * noise, s, 2), inputs)


def test_importance_adds_up_the_weights():
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    assert_close(importance(weights, torch.tensor([[0, 2], [2, 1]]), 4), torch.tensor([0.7, 0.4, 0.9, 0.0]))


def test_the_sources_balance_is_one_for_even_use_and_less_where_weights_and_probabilities_disagree():
    load, weight, probability = expert_use(torch.eye(4, dtype=torch.float64), 1)
    assert load.tolist() == weight.tolist() == [1.0] * 4
    assert_close(source_balance(weight, probability).item(), 1.0)
    falling, rising = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert_close(source_balance(falling, rising).item(), 0.8)
    logits = torch.randn(7, 5, dtype=torch.float64)
    chosen = logits.softmax(-1).topk(2)
    weight = importance(chosen.values / chosen.values.sum(-1, keepdim=True), chosen.indices, 5) / 7
    by_hand = 5 * (weight * logits.softmax(-1).mean(0)).sum()
    assert_close(source_balance(*expert_use(logits, 2)[1:]).double(), by_hand, rtol=1e-6, atol=0)


def test_a_balanced_router_costs_k():
    assert_close(balance_loss(torch.zeros(8, 4), torch.full((4,), 4.0), 8).item(), 2.0)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_the_mean_over_workers_is_the_loss_of_the_joined_batch(scope):
    """Two workers with half of the rows each, and one with all of them: same loss, same gradient."""
    layers = [torch.randn(4 * 10, 5, dtype=torch.float64) for _ in range(3)]  # 4 sequences of 10 tokens
    joined = [z.clone().requires_grad_() for z in layers]
    whole = router_losses(joined, 2, [None] * 3, 10, scope, None)
    whole.balance.backward()
    summed = torch.stack([expert_use(z, 2) for z in layers], dim=1)
    halves, gradients = [], []
    for part in (slice(0, 20), slice(20, 40)):
        own = [z[part].clone().requires_grad_() for z in layers]
        half = router_losses(own, 2, [None] * 3, 10, scope, lambda use: summed)
        assert torch.equal(half.load, whole.load)
        assert_close(half.source_balance, whole.source_balance, rtol=1e-6, atol=0)
        half.balance.backward()
        halves.append(half.balance)
        gradients.append([z.grad / 2 for z in own])
    assert_close(sum(halves) / 2, whole.balance, rtol=1e-9, atol=1e-12)
    for parts, z in zip(zip(*gradients, strict=True), joined, strict=True):
        assert_close(torch.cat(parts), z.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_workers_whose_sequences_differ_in_length(scope):
    """Two workers with 3 + 9 and 8 + 12 tokens: losses and gradients average to those of all of them."""
    lengths = [[3, 9], [8, 12]]
    layers = [torch.randn(32, 5, dtype=torch.float64) for _ in range(2)]
    joined = [z.clone().requires_grad_() for z in layers]
    whole = router_losses(joined, 2, [None] * 2, lengths[0] + lengths[1], scope, None)
    (whole.balance + whole.z).backward()
    summed = torch.stack([expert_use(z, 2) for z in layers], dim=1)
    totals, gradients = [], []
    for part, own_lengths in zip((slice(0, 12), slice(12, 32)), lengths, strict=True):
        own = [z[part].clone().requires_grad_() for z in layers]
        answers = iter([summed, torch.tensor([2.0])])
        parts = router_losses(own, 2, [None] * 2, own_lengths, scope, lambda use, answers=answers: next(answers))
        (parts.balance + parts.z).backward()
        totals.append(parts.balance + parts.z)
        gradients.append([z.grad / 2 for z in own])
    assert_close(sum(totals) / 2, whole.balance + whole.z, rtol=1e-9, atol=1e-12)
    for parts, z in zip(zip(*gradients, strict=True), joined, strict=True):
        assert_close(torch.cat(parts), z.grad, rtol=1e-9, atol=1e-12)


def test_one_layers_crowd_is_not_hidden_by_another():
    crowd = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    loss = router_losses([crowd, crowd.flip(-1)], 1, [None, None], 2, "batch", None).balance
    assert loss > 1.9  # pooled over the layers, as in Mixtral's code, it would be 1, the value of perfect balance
    assert load_balancing_loss_func((crowd, crowd.flip(-1)), num_experts=2, top_k=1) == pytest.approx(1.0)
