"""What every fast scan owes to the loop beside it; x, Δ, B and C are (batch, tokens, ...) and A, D are shared."""

import torch
from torch.testing import assert_close

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def run(scan, inputs, state, directions, starts=None):
    """Outputs of ``scan``, and the gradients of a linear functional of them to all inputs and the state."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, state)]
    y, last = scan(*leaves[:-1], state=leaves[-1], starts=starts)
    gradients = torch.autograd.grad((y * directions[0]).sum() + (last * directions[1]).sum(), leaves)
    return [y.detach(), last.detach(), *gradients]


def assert_equal_to_reference(fast, reference, inputs, state, starts=None, **close):
    directions = [torch.randn_like(inputs[0]), torch.randn_like(state)]
    for ours, expected in zip(
        run(fast, inputs, state, directions, starts), run(reference, inputs, state, directions, starts), strict=True
    ):
        assert_close(ours, expected, **(close or CLOSE))


def assert_pieces_make_the_whole(scan, inputs, state, cuts):
    x, dt, A, B, C, D = inputs
    whole, last = scan(*inputs, state=state)
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = scan(
            *(each[:, begin:end] for each in (x, dt)), A, *(e[:, begin:end] for e in (B, C)), D, state=state
        )
        pieces.append(y)
    assert_close(torch.cat(pieces, dim=1), whole, **CLOSE)
    assert_close(state, last, **CLOSE)


def assert_causal_to_the_bit(scan, inputs, state):
    """Every input of one token is changed; what comes before it stays, to the bit."""
    before, _ = scan(*inputs, state=state)
    token = inputs[0].shape[1] // 2
    changed = [each.clone() for each in inputs]
    for index in (0, 1, 3, 4):
        changed[index][:, token] *= 3
    after, _ = scan(*changed, state=state)
    assert torch.equal(before[:, :token], after[:, :token])
    assert not torch.equal(before[:, token], after[:, token])
    assert not torch.equal(before[:, token + 1 :], after[:, token + 1 :])
