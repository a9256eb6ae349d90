"""Sparsemax against its published values, a quadratic programme's conditions, and finite differences."""

import torch
from torch.testing import assert_close

from mmada.nn.sparsemax import sparsemax, threshold


def test_golden_vectors():
    sparse = torch.tensor([1.2, 0.8, -0.5, 0.1], dtype=torch.float64)
    assert_close(sparsemax(sparse), torch.tensor([0.7, 0.3, 0, 0], dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(threshold(sparse), torch.tensor([0.5], dtype=torch.float64), rtol=0, atol=1e-9)
    dense = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    expected = torch.tensor([0.7, 1.0, 1.3], dtype=torch.float64) / 3
    assert_close(sparsemax(dense), expected, rtol=0, atol=1e-9)
    assert_close(threshold(dense), torch.tensor([-0.4 / 3], dtype=torch.float64), rtol=0, atol=1e-9)


def test_is_the_projection_onto_the_simplex_along_any_dim():
    """Of all points p of the simplex the nearest, by the optimality conditions: p = max(z - τ, 0), sum p = 1."""
    torch.manual_seed(0)
    scores = torch.randn(5, 7, 4, dtype=torch.float64) * 2
    for dim in (0, 1, 2, -1, -2):
        weights = sparsemax(scores, dim)
        assert_close(weights.sum(dim), torch.ones_like(weights.sum(dim)))
        assert weights.min() == 0 and (weights > 0).sum() < weights.numel()
        tau = torch.where(weights > 0, scores - weights, torch.nan)
        spread = tau.nan_to_num(-torch.inf).amax(dim) - tau.nan_to_num(torch.inf).amin(dim)
        assert spread.abs().max() < 1e-12
        outside = torch.where(weights > 0, -torch.inf, scores).amax(dim)
        assert (outside <= tau.nan_to_num(-torch.inf).amax(dim) + 1e-12).all()


def test_gradient_is_the_jacobian_product():
    torch.manual_seed(1)
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sparsemax(z, -1), scores)
    assert torch.autograd.gradcheck(lambda z: sparsemax(z, 0), scores)


def test_masked_scores_weigh_nothing_and_get_no_gradient():
    scores = torch.tensor([[0.3, -torch.inf, 0.1, -torch.inf]], requires_grad=True)
    weights = sparsemax(scores)
    assert_close(weights, torch.tensor([[0.6, 0.0, 0.4, 0.0]]))
    (weights * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert_close(scores.grad, torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))


def test_large_and_half_precision_scores_stay_exact():
    assert sparsemax(torch.tensor([1e8, 1e8 - 64, 0.0])).tolist() == [1.0, 0.0, 0.0]
    half = sparsemax(torch.tensor([300.0, 300.0, 1.0], dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.tolist() == [0.5, 0.5, 0.0]


def test_what_is_no_number_makes_no_number_and_no_error():
    """A run that diverges ends with the loss it has, not with an index that is out of range."""
    scores = torch.tensor([[torch.nan, 0.1], [0.3, 0.3], [-torch.inf, -torch.inf]], requires_grad=True)
    weights = sparsemax(scores)
    assert weights[[0, 2]].isnan().all() and weights[1].tolist() == [0.5, 0.5]
    weights.sum().backward()
