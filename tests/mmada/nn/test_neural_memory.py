"""The neural memory against its recurrences, published values, and its own loop; values and gradients, in float64."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, logsigmoid, normalize
from torch.testing import assert_close

from mmada.nn.chunks import Rows
from mmada.nn.neural_memory import (
    Gates,
    MemoryRule,
    MemoryState,
    memory_scan,
    memory_scan_reference,
    run_memory,
)

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
FORMS = pytest.mark.parametrize("scan", [memory_scan, memory_scan_reference])


def make_inputs(length, depth=2, batch=2, heads=2, width=3, momentum=True, forgetting=True, seed=0):
    """Query, key, value, gates and a first state."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    query, key, value = (draw(batch, heads, length, width) for _ in range(3))
    step, eta, keep = (draw(batch, heads, length) for _ in range(3))
    gates = Gates(
        0.05 * torch.sigmoid(step), logsigmoid(eta) if momentum else None, logsigmoid(keep + 2) if forgetting else None
    )
    widths = [width, *[2 * width] * (depth - 1), width]
    weights = tuple(draw(batch, heads, i, o) / i**0.5 for i, o in itertools.pairwise(widths))
    return query, normalize(key, dim=-1), value, gates, MemoryState.start(weights, momentum)


def tensors_of(inputs):
    """All tensors that a scan is given."""
    query, key, value, gates, state = inputs
    return [query, key, value, *(gate for gate in gates if gate is not None), *(w for part in state for w in part)]


def with_gradients(inputs):
    """The same as leaves. Weights and anchor are one tensor at a start, so they are made from one leaf."""
    query, key, value, gates, state = inputs
    query, key, value = (each.clone().requires_grad_() for each in (query, key, value))
    gates = Gates(*(None if each is None else each.clone().requires_grad_() for each in gates))
    weights, momentum = (tuple(w.clone().requires_grad_() for w in part) for part in (state.weights, state.momentum))
    leaves = [query, key, value, *(gate for gate in gates if gate is not None), *weights, *momentum]
    return (query, key, value, gates, MemoryState(weights, weights, momentum)), leaves


def assert_same(ours, theirs):
    assert_close(ours.read_BHTK, theirs.read_BHTK, **CLOSE)
    assert_close(ours.surprise_BHT, theirs.surprise_BHT, **CLOSE)
    for mine, expected in zip(ours.state, theirs.state, strict=True):
        assert_close(mine, expected, **CLOSE)


@FORMS
def test_golden_vector(scan):
    """k = 1, θ = 0.1, η = 0.5, α = 0.1, v = 1, 1, -1."""
    one = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    value = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).view(1, 1, 3, 1)
    gates = Gates(0.1 * one[..., 0], (0.5 * one[..., 0]).log(), (0.9 * one[..., 0]).log())
    state = MemoryState.start((torch.zeros(1, 1, 1, 1, dtype=torch.float64),), momentum=True)
    momenta = []
    for t in range(3):
        until = slice(t + 1)
        part = Gates(*(gate[:, :, until] for gate in gates))
        result = scan(one[:, :, until], one[:, :, until], value[:, :, until], part, state, MemoryRule(chunk_size=1))
        momenta.append(result.state.momentum[0].item())
    assert momenta == pytest.approx([0.2, 0.26, -0.158], abs=1e-12)
    assert result.read_BHTK.flatten().tolist() == pytest.approx([0.2, 0.44, 0.238], abs=1e-12)  # q = 1: y = M


@FORMS
def test_a_matrix_with_chunks_of_one_token_is_the_momentum_delta_rule(scan):
    """S = η S - θ · 2 kᵀ(k M - v), M = (1 - α) M + S, written out."""
    query, key, value, gates, state = inputs = make_inputs(40, depth=1)
    result = scan(*inputs, MemoryRule(chunk_size=1), want_surprise=True)
    for b, h in itertools.product(range(2), range(2)):
        theta, eta, keep = gates.step[b, h].numpy(), np.exp(gates.log_momentum[b, h]), np.exp(gates.log_keep[b, h])
        memory, momentum = state.weights[0][b, h].numpy().copy(), np.zeros((3, 3))
        for t in range(40):
            q, k, v = (each[b, h, t].numpy() for each in (query, key, value))
            u = 2 * np.outer(k, k @ memory - v)
            momentum = float(eta[t]) * momentum - theta[t] * u
            memory = float(keep[t]) * memory + momentum
            assert np.abs(q @ memory - result.read_BHTK[b, h, t].numpy()).max() < 1e-10
            assert abs(np.linalg.norm(u) - result.surprise_BHT[b, h, t].item()) < 1e-10
        assert np.abs(memory - result.state.weights[0][b, h].numpy()).max() < 1e-10
        assert np.abs(momentum - result.state.momentum[0][b, h].numpy()).max() < 1e-10


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@torch.no_grad()
def test_chunks_equal_the_loop(depth, chunk_size):
    """At odd lengths, too, with each part switched off once, and without gradients being recorded."""
    for length, momentum, forgetting in itertools.product([1, 63, 100, 96], [True, False], [True, False]):
        inputs = make_inputs(length, depth, momentum=momentum, forgetting=forgetting, batch=1)
        before = [each.clone() for each in tensors_of(inputs)]
        rule = MemoryRule(chunk_size, activation="silu" if length == 63 else "gelu")
        assert_same(memory_scan(*inputs, rule, want_surprise=True), memory_scan_reference(*inputs, rule))
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(inputs), before, strict=True))


@pytest.mark.parametrize("length", [1, 23, 63, 96, 100])
@pytest.mark.parametrize(
    ("rule", "depth"),
    [
        (MemoryRule(1), 2),
        (MemoryRule(4, max_gradient_norm=0.5), 1),
        (MemoryRule(5, activation="silu"), 3),
        (MemoryRule(16, gate="soft", threshold=2.0, temperature=0.5), 2),
        (MemoryRule(4, gate="hard", threshold=2.0), 2),
    ],
)
def test_training_through_the_memory_equals_autograd_through_the_loop(rule, depth, length):
    """Gradients of what is read and of the last state: the gradients that the memory itself takes are on their way.

    The loop takes those by torch.func, so this compares second derivatives that nobody wrote down.
    """
    random = torch.Generator().manual_seed(1)
    results = []
    for scan in (memory_scan, memory_scan_reference):
        inputs, leaves = with_gradients(make_inputs(length, depth))
        result = scan(*inputs, rule)
        random.manual_seed(1)
        outputs = (result.read_BHTK, *result.state.weights, *result.state.momentum)
        total = sum((each * torch.randn(each.shape, dtype=torch.float64, generator=random)).sum() for each in outputs)
        results.append(torch.autograd.grad(total, leaves))
    for mine, expected in zip(*results, strict=True):
        assert length == 1 or expected.abs().max() > 0  # the first token has no momentum to keep
        assert_close(mine, expected, **CLOSE)


def test_a_loss_on_gradients_can_be_trained():
    """One derivative more, as a penalty on gradients of the outer loss needs."""
    inputs, leaves = with_gradients(make_inputs(5, batch=1, heads=1))

    def read(weight):
        query, key, value, gates, state = inputs
        weights = (weight, *state.weights[1:])
        return memory_scan(query, key, value, gates, MemoryState(weights, weights, state.momentum), MemoryRule(2))[0]

    assert torch.autograd.gradgradcheck(read, (leaves[6],))


def test_a_chunk_has_the_closed_form_of_the_paper():
    """M_t = β_t M_0 + f_t S_0 - Σ_j G_tj u_j, all gradients at M_0, the coefficients as sums of products."""
    query, key, value, gates, state = inputs = make_inputs(7, depth=1, batch=1, heads=1)
    start, before = state.weights[0], torch.randn(1, 1, 3, 3, dtype=torch.float64)
    inputs = (*inputs[:-1], MemoryState((start,), (start,), (before,)))
    read = memory_scan(*inputs, MemoryRule(chunk_size=7)).read_BHTK[0, 0]
    theta, eta, keep = gates.step[0, 0], gates.log_momentum[0, 0].exp(), gates.log_keep[0, 0].exp()
    for t in range(7):
        memory = keep[: t + 1].prod() * start[0, 0]
        memory = memory + sum(keep[k + 1 : t + 1].prod() * eta[: k + 1].prod() for k in range(t + 1)) * before[0, 0]
        for j in range(t + 1):
            share = sum(keep[k + 1 : t + 1].prod() * eta[j + 1 : k + 1].prod() for k in range(j, t + 1))
            u = 2 * torch.outer(key[0, 0, j], key[0, 0, j] @ start[0, 0] - value[0, 0, j])
            memory = memory - theta[j] * share * u
        assert_close(read[t], query[0, 0, t] @ memory, **CLOSE)


@FORMS
@torch.no_grad()
def test_rows_go_on_wherever_they_are(scan):
    """Rows of different lengths in pieces, some without a new token, give what each gives alone and at once."""
    new_PB = [[3, 0, 5], [1, 1, 1], [0, 7, 2], [9, 4, 4]]
    totals = torch.tensor(new_PB).sum(dim=0)
    rule = MemoryRule(chunk_size=4, max_gradient_norm=1.0)
    query, key, value, gates, state = make_inputs(int(totals.max()), batch=3)
    reads, past = [[] for _ in totals], torch.zeros(3, dtype=torch.int64)
    for new in map(torch.tensor, new_PB):
        width = int(new.max()) + 1  # a column of padding at least
        columns = (past[:, None] + torch.arange(width)).clamp(max=query.shape[2] - 1)

        def pick(states, columns=columns):
            return torch.stack([row[:, index] for row, index in zip(states, columns, strict=True)])

        rows = Rows(width, past, new, torch.device("cpu"))
        piece = Gates(*map(pick, gates))
        result = scan(pick(query), pick(key), pick(value), piece, state, rule, rows)
        assert result.read_BHTK.isfinite().all()
        state, past = result.state, past + new
        for row, count in enumerate(new):
            reads[row].append(result.read_BHTK[row, :, :count])
    for row, total in enumerate(totals):
        own = [each[row : row + 1, :, :total] for each in (query, key, value)]
        first = make_inputs(int(totals.max()), batch=3)[-1]
        first = MemoryState(*(tuple(w[row : row + 1] for w in part) for part in first))
        alone = memory_scan_reference(*own, Gates(*(g[row : row + 1, :, :total] for g in gates)), first, rule)
        assert_close(torch.cat(reads[row], dim=1), alone.read_BHTK[0], **CLOSE)
        for mine, expected in zip(
            state.weights + state.momentum, alone.state.weights + alone.state.momentum, strict=True
        ):
            assert_close(mine[row], expected[0], **CLOSE)


def test_padding_gets_no_gradient_and_changes_nothing():
    (query, key, value, gates, state), leaves = with_gradients(make_inputs(9))
    rows = Rows(9, torch.tensor([0, 6]), torch.tensor([9, 4]), torch.device("cpu"))
    with torch.no_grad():
        key[1, :, 4:], value[1, :, 4:] = torch.nan_to_num(key[1, :, 4:] / 0), 1e30
    result = memory_scan(query, key, value, gates, state, MemoryRule(4), rows)
    total = result.read_BHTK[0].sum() + result.read_BHTK[1, :, :4].sum() + sum(w.sum() for w in result.state.weights)
    total.backward()
    for leaf in leaves[:6]:
        assert leaf.grad.isfinite().all()
        assert leaf.grad[1, :, 4:].abs().max() == 0


def test_gates_that_are_shut_or_wide_open_stay_finite():
    """α → 1 forgets everything, η → 0 has no momentum: products underflow, and nothing becomes 0/0."""
    query, key, value, gates, state = make_inputs(40)
    for log_momentum, log_keep in ((-1e4, -1e4), (-1e-9, -1e4), (-1e4, -1e-9), (-300.0, -300.0)):
        extreme = Gates(
            gates.step, torch.full_like(gates.step, log_momentum), torch.full_like(gates.step, log_keep)
        )  # fmt: skip
        inputs, leaves = with_gradients((query, key, value, extreme, state))
        for scan in (memory_scan, memory_scan_reference):
            result = scan(*inputs, MemoryRule(16))
            assert result.read_BHTK.isfinite().all()
        assert_close(memory_scan(*inputs, MemoryRule(16)).read_BHTK, result.read_BHTK, **CLOSE)
        gradients = torch.autograd.grad(memory_scan(*inputs, MemoryRule(16)).read_BHTK.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_surprise_gates_learning():
    """Below the threshold of a hard gate nothing is learnt; a clamped gradient is as long as its bound at most."""
    query, key, value, gates, state = inputs = make_inputs(8, depth=2, forgetting=False)
    surprise = memory_scan(*inputs, MemoryRule(8), want_surprise=True).surprise_BHT
    shut = memory_scan(*inputs, MemoryRule(8, gate="hard", threshold=float(surprise.max())))
    assert_close(shut.read_BHTK, run_memory(state.weights, query, "gelu"), **CLOSE)
    assert_close(shut.surprise_BHT, surprise, **CLOSE)
    open_ = memory_scan(*inputs, MemoryRule(8, gate="hard", threshold=0.0))
    assert_close(open_.read_BHTK, memory_scan(*inputs, MemoryRule(8)).read_BHTK, **CLOSE)
    single = make_inputs(1, depth=2, momentum=False, forgetting=False)
    clamped = memory_scan(*single, MemoryRule(1, max_gradient_norm=0.25), want_surprise=True)
    moved = torch.stack(
        [(a - b).flatten(2).norm(dim=-1) for a, b in zip(clamped.state.weights, single[-1].weights, strict=True)]
    )
    factor = 1 / (1 + (clamped.surprise_BHT / 0.25) ** 2) ** 0.5
    assert_close(moved.norm(dim=0), (single[3].step * clamped.surprise_BHT * factor)[..., 0], **CLOSE)
    assert (moved.norm(dim=0) < 0.25 * single[3].step[..., 0]).all()


def test_it_learns_what_it_reads():
    """Told the same pairs again and again, the memory ends up answering them."""
    random = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=random))[0][:4]
    values = torch.randn(4, 8, dtype=torch.float64, generator=random)
    times = 200
    key, value = (each.repeat(times, 1)[None, None] for each in (keys, values))
    weights = tuple(
        torch.randn(1, 1, i, o, dtype=torch.float64, generator=random) / i**0.5 for i, o in [(8, 32), (32, 8)]
    )
    constant = torch.ones(1, 1, 4 * times, dtype=torch.float64)
    gates = Gates(0.01 * constant, (0.5 * constant).log(), None)
    read = memory_scan(key, key, value, gates, MemoryState.start(weights, True), MemoryRule(4)).read_BHTK[0, 0]
    before, after = ((read[part] - value[0, 0, part]).norm() for part in (slice(4), slice(-4, None)))
    assert after < 0.01 * before
    assert_close(run_memory(weights, key, "gelu"), gelu(key @ weights[0]) @ weights[1])
