"""State-space duality against its loop and transformers' Mamba-2, values and gradients."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from mmada.nn import blocks
from mmada.nn.ssd import segment_decays, ssd, ssd_reference
from tests.mmada.nn.scan_checks import assert_causal_to_the_bit, assert_equal_to_reference, assert_pieces_make_the_whole

HEADS, WIDTH, GROUPS, STATES, CHUNK = 4, 3, 2, 5, 16


def reference(x, dt, A, B, C, D, state=None, starts=None):
    return ssd_reference(x, dt, A, B, C, D, state_BHPN=state, starts_BT=starts)


def fast(x, dt, A, B, C, D, state=None, starts=None):
    return ssd(x, dt, A, B, C, D, state_BHPN=state, starts_BT=starts, chunk_size=CHUNK)


@pytest.fixture(autouse=True)
def blocks_of_two_chunks(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 2 * 2 * HEADS * CHUNK**2 * 8)


def make_inputs(length, dtype=torch.float64, largest_step=0.3, groups=GROUPS):
    torch.manual_seed(length)
    inputs = (
        torch.randn(2, length, HEADS, WIDTH),
        torch.rand(2, length, HEADS) * largest_step,
        -1 - 15 * torch.rand(HEADS),
        torch.randn(2, length, groups, STATES),
        torch.randn(2, length, groups, STATES),
        torch.randn(HEADS),
    )
    return [each.to(dtype) for each in inputs], torch.randn(2, HEADS, WIDTH, STATES, dtype=dtype)


def test_segment_decays_are_products_of_what_lies_between():
    log_decay = -torch.rand(7, dtype=torch.float64)
    decays = segment_decays(log_decay)
    for source in range(7):
        for target in range(7):
            between = log_decay[source + 1 : target + 1].sum().exp() if source <= target else torch.zeros(()).double()
            assert_close(decays[source, target], between)
    # After a strong decay the digits of the weak ones are still there.
    late = segment_decays(torch.tensor([-1.0, -3e6, -1e-3, -1e-3]))[1, 3]
    assert_close(late, torch.tensor(-2e-3).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_loop_by_value_and_gradient(length, groups):
    inputs, state = make_inputs(length, groups=groups)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, length // 2], starts[1, length // 3] = True, True
    assert_equal_to_reference(fast, reference, inputs, state)
    assert_equal_to_reference(fast, reference, inputs, state, starts)


def test_equals_transformers_by_value_and_gradient(monkeypatch):
    inputs, state = make_inputs(100)

    def theirs(x, dt, A, B, C, D, state, starts):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it computes in float32 otherwise
            return mamba2_chunk_scan(x, dt, A, B, C, 32, D=D, initial_states=state, return_final_states=True)

    assert_equal_to_reference(fast, theirs, inputs, state)


def test_pieces_make_the_whole_and_nothing_flows_back():
    inputs, state = make_inputs(70)
    assert_pieces_make_the_whole(fast, inputs, state, [1, 2, 19, 69])
    assert_causal_to_the_bit(fast, inputs, state)


def test_tokens_without_a_step_leave_the_state_and_starts_forget_it():
    inputs, state = make_inputs(40)
    still = [each.clone() for each in inputs]
    still[1][:, 30:] = 0
    short = [each[:, :30] if each.dim() > 2 else each for each in inputs]
    assert_close(fast(*still, state=state)[1], fast(*short, state=state)[1], rtol=1e-12, atol=1e-12)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 30] = True
    noisy = state * 1e200  # nothing of it may be left
    late = [each[:, 30:] if each.dim() > 2 else each for each in inputs]
    y, last = fast(*inputs, state=noisy, starts=starts)
    alone_y, alone_last = fast(*late)
    assert_close(y[:, 30:], alone_y, rtol=1e-12, atol=1e-12)
    assert_close(last, alone_last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("largest_step", [1e-5, 1.0, 1000.0])
def test_float32_keeps_its_digits_where_decays_are_weak_or_strong(largest_step):
    """Gradients of A and Δ, too: they are small beside what would cancel in a difference of sums."""
    inputs, state = make_inputs(100, torch.float32, largest_step=largest_step)
    wide = [each.double() for each in inputs]
    directions = torch.randn(2, 100, HEADS, WIDTH)
    gradients = []
    for scan, own in ((fast, inputs), (reference, wide)):
        leaves = [each.requires_grad_() for each in own]
        y, _ = scan(*leaves, state=state.to(own[0].dtype))
        gradients.append([y.detach(), *torch.autograd.grad((y * directions).sum(), leaves)])
    for ours, exact in zip(*gradients, strict=True):
        assert (ours - exact).abs().max() < 2e-6 * exact.abs().max()


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
