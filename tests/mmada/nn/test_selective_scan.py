"""The selective scan against its loop and a golden vector, values and gradients."""

import pytest
import torch
from torch.testing import assert_close

from mmada.nn import blocks
from mmada.nn.selective_scan import selective_scan, selective_scan_reference
from tests.mmada.nn.scan_checks import assert_causal_to_the_bit, assert_equal_to_reference, assert_pieces_make_the_whole

CHANNELS, STATES = 6, 4


def reference(x, dt, A, B, C, D, state=None, starts=None):
    return selective_scan_reference(x, dt, A, B, C, D, state_BIN=state, starts_BT=starts)


def fast(x, dt, A, B, C, D, state=None, starts=None):
    return selective_scan(x, dt, A, B, C, D, state_BIN=state, starts_BT=starts)


@pytest.fixture(autouse=True)
def blocks_of_sixteen_tokens(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 16 * 2 * CHANNELS * STATES * 8)


def make_inputs(length, dtype=torch.float64, largest_step=1.0):
    torch.manual_seed(length)
    inputs = (
        torch.randn(2, length, CHANNELS),
        torch.rand(2, length, CHANNELS) * largest_step,
        -torch.arange(1.0, STATES + 1).expand(CHANNELS, -1),
        torch.randn(2, length, STATES),
        torch.randn(2, length, STATES),
        torch.randn(CHANNELS),
    )
    return [each.to(dtype) for each in inputs], torch.randn(2, CHANNELS, STATES, dtype=dtype)


@pytest.mark.parametrize("scan", [reference, fast])
def test_golden_vector_of_one_state(scan):
    """With Euler's step; the zero-order hold gives other numbers."""
    by_token = torch.tensor([[1, 0.5, 1, 1], [0, 0.5, 1, 1], [2, 1, 0.5, 2]], dtype=torch.float64)
    x, dt, B, C = by_token.T[:, None, :, None]
    one = torch.ones(1, dtype=torch.float64)
    y, state = scan(x, dt, -one[:, None], B, C, one)
    assert_close(y.flatten(), torch.tensor([1.5, 0.303265, 4.223130], dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(state.flatten(), torch.tensor([1.111565], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 100])
def test_equals_the_loop_by_value_and_gradient(length):
    inputs, state = make_inputs(length)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, length // 2], starts[1, length // 3] = True, True
    assert_equal_to_reference(fast, reference, inputs, state)
    assert_equal_to_reference(fast, reference, inputs, state, starts)


def test_pieces_make_the_whole_and_nothing_flows_back():
    inputs, state = make_inputs(50)
    assert_pieces_make_the_whole(fast, inputs, state, [1, 2, 19, 49])
    assert_causal_to_the_bit(fast, inputs, state)


def test_tokens_without_a_step_leave_the_state_and_starts_forget_it():
    inputs, state = make_inputs(40)
    still = [each.clone() for each in inputs]
    still[1][:, 30:] = 0
    short = [each[:, :30] if each.dim() == 3 else each for each in inputs]
    assert torch.equal(fast(*still, state=state)[1], fast(*short, state=state)[1])
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 30] = True
    late = [each[:, 30:] if each.dim() == 3 else each for each in inputs]
    for ours, alone in zip(fast(*inputs, state=state, starts=starts), fast(*late), strict=True):
        assert_close(ours[:, -10:] if ours.shape[1] == 40 else ours, alone, rtol=1e-12, atol=1e-12)


def test_float32_keeps_its_digits_where_decays_are_strong():
    inputs, state = make_inputs(100, torch.float32, largest_step=100.0)  # decays down to e^-400
    assert_equal_to_reference(fast, reference, inputs, state, rtol=1e-4, atol=1e-3)


def test_narrow_inputs_are_computed_in_float32_under_autocast_too():
    inputs, state = make_inputs(40, torch.float32)
    inputs = [each.bfloat16() for each in inputs]
    exact, _ = reference(*(each.float() for each in inputs), state=state)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = fast(*(each.requires_grad_() for each in inputs), state=state)
        y.sum().backward()
    assert y.dtype == last.dtype == torch.float32
    assert_close(y.detach(), exact)
    assert all(each.grad.dtype == torch.bfloat16 and each.grad.isfinite().all() for each in inputs)
