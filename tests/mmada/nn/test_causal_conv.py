"""The short convolution against torch's own, and its state in rows of different lengths."""

import pytest
import torch
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.nn import blocks
from mmada.nn.causal_conv import CausalConv, causal_conv, causal_conv_reference
from tests.mmada.nn.layers import make_context

CHANNELS, KERNEL = 5, 4


def make_inputs(length, dtype=torch.float64):
    torch.manual_seed(length)
    shapes = (2, length + KERNEL - 1, CHANNELS), (CHANNELS, KERNEL), (CHANNELS,)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def torchs_own(x, weight, bias, same=None):
    return torch.nn.functional.conv1d(x.mT, weight[:, None], bias, groups=CHANNELS).mT


@pytest.mark.parametrize("length", [1, 2, 63, 100])
@pytest.mark.parametrize("with_documents", [False, True])
def test_equals_torch_and_the_reference_by_value_and_gradient(length, with_documents, monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", 16 * 2 * CHANNELS * 8)
    inputs, direction = make_inputs(length), torch.randn(2, length, CHANNELS, dtype=torch.float64)
    same = torch.rand(2, length, KERNEL) < 0.7 if with_documents else None
    results = []
    for conv in (causal_conv, causal_conv_reference, *([] if with_documents else [torchs_own])):
        y = conv(*inputs, same)
        results.append([y, *torch.autograd.grad((y * direction).sum(), inputs)])
    for ours, *others in zip(*results, strict=True):
        for other in others:
            assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_bfloat16_is_summed_in_float32():
    inputs = [each.detach().bfloat16().requires_grad_() for each in make_inputs(30)]
    y = causal_conv(*inputs)
    y.sum().backward()
    assert torch.equal(y, torchs_own(*(each.float() for each in inputs)).bfloat16())
    assert all(each.grad.dtype == torch.bfloat16 for each in inputs)


def test_the_state_is_of_the_last_real_inputs_and_documents_start_anew():
    config = MMaDAConfig(num_hidden_layers=1)
    conv = CausalConv(CHANNELS, KERNEL).double()
    x = torch.randn(3, 9, CHANNELS, dtype=torch.float64)
    before = torch.randn(3, KERNEL - 1, CHANNELS, dtype=torch.float64)
    _, after = conv(x, before, make_context(config, 3, 9, lengths=[9, 0, 2]))
    assert torch.equal(after[0], x[0, 6:])
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], torch.cat([before[2, 2:], x[2, :2]]))
    documents = torch.tensor([[0] * 5 + [1] + [2] * 3])
    packed, _ = conv(x[:1], None, make_context(config, 1, 9, documents=documents))
    for begin, end in [(0, 5), (5, 6), (6, 9)]:
        alone, _ = conv(x[:1, begin:end], None, make_context(config, 1, end - begin))
        assert_close(packed[:, begin:end], alone, rtol=1e-12, atol=1e-12)
