"""What holds for the loss of every algorithm, and each one's formula written out row by row."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmada.training.algorithms import ALGORITHMS, Counts, LossParts, LossSettings, PolicyBatch
from tests.mmada.training.algorithms.batches import gradients, policy_batch, rows

SETTINGS = LossSettings(
    clip_epsilon=0.15,
    value_clip_epsilon=0.3,
    value_coefficient=0.7,
    entropy_coefficient=0.02,
    kl_coefficient=0.04,
    max_completion_tokens=9,
)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def loss_of(
    name: str, batch: PolicyBatch, settings: LossSettings = SETTINGS, counts: Counts | None = None
) -> LossParts:
    return ALGORITHMS[name].loss(batch, settings, counts or Counts.of(batch.mask_BT))


def per_token(batch: PolicyBatch, b: int, t: int) -> Tensor:
    """The clipped surrogate of one token, as TRL writes it."""
    ratio = torch.exp(batch.logprobs_BT[b, t] - batch.old_logprobs_BT[b, t])
    clipped = torch.clamp(ratio, 1 - SETTINGS.clip_epsilon, 1 + SETTINGS.clip_epsilon)
    return -torch.min(ratio * batch.advantages_BT[b, t], clipped * batch.advantages_BT[b, t])


def grpo_token(batch: PolicyBatch, b: int, t: int) -> Tensor:
    x = batch.reference_logprobs_BT[b, t] - batch.logprobs_BT[b, t]
    return per_token(batch, b, t) + 0.04 * (torch.exp(x) - x - 1)


def rows_of(batch: PolicyBatch, token: Callable[[PolicyBatch, int, int], Tensor]) -> list[list[Tensor]]:
    return [[token(batch, b, t) for t in range(length)] for b, length in enumerate(batch.mask_BT.sum(dim=1).tolist())]


def grpo_by_hand(batch: PolicyBatch) -> Tensor:
    return torch.stack([torch.stack(row).mean() for row in rows_of(batch, grpo_token)]).mean() - entropy_by_hand(batch)


def dr_grpo_by_hand(batch: PolicyBatch) -> Tensor:
    total = torch.stack([torch.stack(row).sum() for row in rows_of(batch, grpo_token)]).sum()
    return total / (len(batch.mask_BT) * 9) - entropy_by_hand(batch)


def ppo_by_hand(batch: PolicyBatch) -> Tensor:
    def token(batch: PolicyBatch, b: int, t: int) -> Tensor:
        value, old, goal = batch.values_BT[b, t], batch.old_values_BT[b, t], batch.returns_BT[b, t]
        clipped = torch.clamp(value, old - 0.3, old + 0.3)
        value_loss = 0.5 * torch.max((value - goal) ** 2, (clipped - goal) ** 2)
        return per_token(batch, b, t) + 0.7 * value_loss - 0.02 * batch.entropy_BT[b, t]

    return torch.stack([each for row in rows_of(batch, token) for each in row]).mean()


def entropy_by_hand(batch: PolicyBatch) -> Tensor:
    return (
        0.02 * torch.stack([each for row in rows_of(batch, lambda x, b, t: x.entropy_BT[b, t]) for each in row]).mean()
    )


def rloo_by_hand(batch: PolicyBatch) -> Tensor:
    losses = []
    for b, length in enumerate(batch.mask_BT.sum(dim=1).tolist()):
        ratio = torch.exp(batch.logprobs_BT[b, :length].sum() - batch.old_logprobs_BT[b, :length].sum())
        clipped = torch.clamp(ratio, 0.85, 1.15)
        losses.append(-torch.min(ratio * batch.advantages_BT[b, 0], clipped * batch.advantages_BT[b, 0]))
    return torch.stack(losses).mean() - entropy_by_hand(batch)


def reinforce_by_hand(batch: PolicyBatch) -> Tensor:
    scores = [
        -batch.advantages_BT[b, 0] * batch.logprobs_BT[b, :length].sum()
        for b, length in enumerate(batch.mask_BT.sum(dim=1).tolist())
    ]
    return torch.stack(scores).mean() - entropy_by_hand(batch)


BY_HAND = {
    "ppo": ppo_by_hand,
    "grpo": grpo_by_hand,
    "dr_grpo": dr_grpo_by_hand,
    "rloo": rloo_by_hand,
    "reinforce": reinforce_by_hand,
}


def test_every_algorithm_is_in_the_table_under_its_name():
    assert {name: each.name for name, each in ALGORITHMS.items()} == {name: name for name in BY_HAND}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_is_its_formula_written_out_and_so_are_its_gradients(name: str):
    batch = policy_batch()
    ours, expected = loss_of(name, batch).total, BY_HAND[name](batch)
    torch.testing.assert_close(ours, expected, **EXACT)
    expected_gradients = gradients(batch, expected)
    assert any(each.any() for each in expected_gradients.values())
    for field, gradient in gradients(batch, ours).items():
        torch.testing.assert_close(gradient, expected_gradients[field], **EXACT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_are_those_of_finite_differences(name: str):
    batch = policy_batch(seed=1)
    names = ("logprobs_BT", "values_BT", "entropy_BT")

    def total(*tensors: Tensor) -> Tensor:
        for field, tensor in zip(names, tensors, strict=True):
            setattr(batch, field, tensor)
        return loss_of(name, batch).total

    tensors = tuple(getattr(batch, field) for field in names)
    assert torch.autograd.gradcheck(total, tensors, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[4], [2, 0, 1, 5], [3]]])
def test_micro_batches_add_up_to_the_minibatch(name: str, split: list[list[int]]):
    batch = policy_batch()
    counts = sum((Counts.of(batch.mask_BT[part]) for part in split), Counts(0, 0))
    assert counts == Counts.of(batch.mask_BT)
    whole = loss_of(name, batch)
    pieces = [loss_of(name, rows(batch, part), counts=counts) for part in split]
    together = pieces[0]
    for piece in pieces[1:]:
        together = together + piece
    for field in vars(whole):
        torch.testing.assert_close(getattr(together, field), getattr(whole, field), **EXACT)
    gradients_of_whole = gradients(batch, whole.total)
    for field, gradient in gradients(batch, together.total).items():
        torch.testing.assert_close(gradient, gradients_of_whole[field], **EXACT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_rows_that_fill_a_micro_batch_up_count_for_nothing(name: str):
    batch, counts = policy_batch(), Counts.of(policy_batch().mask_BT)
    filled = rows(batch, [0, 1, 2, 3, 4, 5, 2, 0])
    filled.mask_BT = filled.mask_BT.clone()
    filled.mask_BT[6:] = 0
    whole, same = loss_of(name, batch), loss_of(name, filled, counts=counts)
    for field in vars(whole):
        torch.testing.assert_close(getattr(same, field), getattr(whole, field), **EXACT)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_stands_behind_a_completion_changes_nothing(name: str):
    plain, strange = policy_batch(), policy_batch(behind=float("inf"))
    ours, theirs = loss_of(name, plain), loss_of(name, strange)
    for field in vars(ours):
        torch.testing.assert_close(getattr(theirs, field), getattr(ours, field), **EXACT)
    for gradient in gradients(strange, theirs.total).values():
        assert gradient.isfinite().all() and not gradient[~strange.mask_BT].any()


def test_ppo_clip_gives_the_golden_numbers():
    ratio_BT = torch.tensor([[1.5, 0.5, 1.1, 0.95]], dtype=torch.float64)
    zeros_BT = torch.zeros_like(ratio_BT)
    batch = PolicyBatch(
        logprobs_BT=ratio_BT.log(),
        old_logprobs_BT=zeros_BT,
        advantages_BT=torch.tensor([[1.0, 1, -1, -1]]).double(),
        mask_BT=torch.ones(1, 4),
        returns_BT=zeros_BT,
        values_BT=zeros_BT,
        old_values_BT=zeros_BT,
    )
    parts = loss_of("ppo", batch, LossSettings(clip_epsilon=0.2))
    assert parts.policy.item() == pytest.approx(0.0875, abs=1e-12) == parts.total.item()
    assert parts.clip_fraction.item() == 0.5
    assert parts.ratio_mean.item() == pytest.approx(ratio_BT.mean().item()) and parts.ratio_max.item() == pytest.approx(
        1.5
    )
    for t, expected in enumerate((-1.2, -0.5, 1.1, 0.95)):
        batch.mask_BT = (torch.arange(4) == t)[None]
        assert loss_of("ppo", batch, LossSettings(clip_epsilon=0.2)).policy.item() == pytest.approx(expected, abs=1e-12)


def test_ppo_is_stable_baselines3s_where_values_do_not_leave_their_range():
    """The lines of PPO.train: there the clipped value alone is judged; ours takes the worse of both."""
    batch = policy_batch()
    mask_BT, clip_range, clip_range_vf = batch.mask_BT, 0.15, 0.3
    moves_BT = (batch.values_BT - batch.old_values_BT).detach().clamp(-0.29, 0.29)
    batch.values_BT = (batch.old_values_BT + moves_BT).requires_grad_()
    advantages, log_prob, old_log_prob = (
        x[mask_BT] for x in (batch.advantages_BT, batch.logprobs_BT, batch.old_logprobs_BT)
    )
    values, old_values, returns = (x[mask_BT] for x in (batch.values_BT, batch.old_values_BT, batch.returns_BT))

    ratio = torch.exp(log_prob - old_log_prob)
    policy_loss_1 = advantages * ratio
    policy_loss_2 = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
    policy_loss = -torch.min(policy_loss_1, policy_loss_2).mean()
    clip_fraction = torch.mean((torch.abs(ratio - 1) > clip_range).float()).item()
    values_pred = old_values + torch.clamp(values - old_values, -clip_range_vf, clip_range_vf)
    value_loss = F.mse_loss(returns, values_pred)
    entropy_loss = -torch.mean(batch.entropy_BT[mask_BT])
    loss = policy_loss + 0.02 * entropy_loss + 0.35 * value_loss
    log_ratio = log_prob - old_log_prob
    approx_kl_div = torch.mean((torch.exp(log_ratio) - 1) - log_ratio).item()

    parts = loss_of("ppo", batch)
    torch.testing.assert_close(parts.total, loss, **EXACT)
    assert parts.approx_kl.item() == pytest.approx(approx_kl_div, abs=1e-12)
    assert parts.clip_fraction.item() == pytest.approx(clip_fraction, abs=1e-7) and parts.value_clip_fraction == 0
    expected_gradients = gradients(batch, loss)
    for field, gradient in gradients(batch, parts.total).items():
        torch.testing.assert_close(gradient, expected_gradients[field], **EXACT)


def test_a_value_that_moved_too_far_towards_its_goal_gets_no_gradient():
    one = torch.ones(1, 3).double()
    batch = PolicyBatch(
        logprobs_BT=0 * one,
        old_logprobs_BT=0 * one,
        advantages_BT=0 * one,
        mask_BT=one,
        returns_BT=one,
        values_BT=torch.tensor([[0.5, 0.1, -0.5]], dtype=torch.float64).requires_grad_(),
        old_values_BT=0 * one,
    )
    settings = LossSettings(value_clip_epsilon=0.2, value_coefficient=1.0)
    parts = loss_of("ppo", batch, settings)
    # (0.2 - 1)² > (0.5 - 1)²: stopped; 0.1 is within the range; -0.5 moved away and may come back
    torch.testing.assert_close(
        gradients(batch, parts.total)["values_BT"], torch.tensor([[0, -0.3, -0.5]], dtype=torch.float64)
    )
    assert parts.value.item() == pytest.approx((0.64 + 0.81 + 2.25) / 6)
    assert parts.value_clip_fraction.item() == pytest.approx(2 / 3)
    free = loss_of("ppo", batch, LossSettings(value_clip_epsilon=None, value_coefficient=1.0))
    assert free.value.item() == pytest.approx((0.25 + 0.81 + 2.25) / 6) and free.value_clip_fraction == 0


@pytest.mark.parametrize(("name", "scale"), [("rloo", 1.0), ("grpo", 1 / 7), ("dr_grpo", 1 / 9), ("ppo", 1 / 7)])
def test_on_the_policy_that_sampled_the_gradient_is_reinforces(name: str, scale: float):
    """Up to each algorithm's own mean over tokens; without the terms beside the policy's."""
    settings = LossSettings(value_coefficient=0.0, max_completion_tokens=9)
    batch = policy_batch(lengths=[7, 7, 7])
    batch.old_logprobs_BT = batch.logprobs_BT.detach().clone()
    expected = gradients(batch, loss_of("reinforce", batch, settings).total)["logprobs_BT"]
    assert expected.any()
    ours = gradients(batch, loss_of(name, batch, settings).total)["logprobs_BT"]
    torch.testing.assert_close(ours, scale * expected, **EXACT)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_a_price_without_a_reference_is_refused(name: str):
    batch = policy_batch()
    batch.reference_logprobs_BT = None
    with pytest.raises(ValueError, match="kl_coefficient=0.04 asks for a reference"):
        loss_of(name, batch)
    assert loss_of(name, batch, LossSettings()).kl == 0


def test_ppo_without_a_critics_values_is_refused():
    batch = policy_batch()
    batch.old_values_BT = None
    with pytest.raises(ValueError, match="ppo asks for values_BT, old_values_BT and returns_BT"):
        loss_of("ppo", batch)
