"""The whole model against transformers' Byte Latent Transformer, by value and by gradient, in float64."""

import pytest
import torch
from torch.testing import assert_close

from mmada.nn.patches.boundaries import patch_ends
from tests.mmada.nn.patches.blt_weights import converted, make_pair


def gradients(model, logits, direction):
    model.zero_grad()
    (logits * direction).sum().backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def assert_same_gradients(ours, theirs, logits_ours, logits_theirs):
    # Their logits are cast to float32 last: a direction that is exact there leaves the gradients in float64.
    direction = torch.randn(logits_ours.shape, generator=torch.Generator().manual_seed(2)).double()
    mine = gradients(ours, logits_ours, direction)
    gradients(theirs, logits_theirs, direction)
    for p in theirs.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    expected = converted(theirs)
    assert mine.keys() == expected.keys()
    for name, gradient in mine.items():
        assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    trained = [name for name in mine if "entropy_model" not in name]
    assert all(mine[name].abs().max() > 0 for name in trained)


@pytest.mark.parametrize("length", [1, 2, 37])
def test_equals_transformers_with_given_patches(monkeypatch, length):
    """A batch; their lengths reach one byte further than the text, so that they know whether the last byte ends one."""
    ours, theirs = make_pair(monkeypatch, window=None)
    ids = torch.randint(8, 264, (2, length), generator=torch.Generator().manual_seed(1))
    ends = patch_ends(ours.config.patches, torch.arange(length)[None].expand(2, -1), torch.zeros(2, length))
    starts = [0, *(ends[0].nonzero()[:, 0] + 1).tolist(), length + 1]
    lengths = torch.diff(torch.tensor(starts))[None].expand(2, -1)
    logits, expected = ours(ids, use_cache=False).logits, theirs(ids, patch_lengths=lengths, use_cache=False).logits
    assert_close(logits.float(), expected, rtol=1e-6, atol=1e-6)
    if length > 2:
        assert_same_gradients(ours, theirs, logits, expected.double())


def test_equals_transformers_with_a_window_and_patches_by_entropy(monkeypatch):
    """The boundaries come from an entropy model with their weights, too. They never let the last byte end a patch."""
    ours, theirs = make_pair(monkeypatch, window=9, threshold=0.0)
    ids = torch.randint(8, 264, (1, 60), generator=torch.Generator().manual_seed(1))
    entropy, _, _ = theirs.model.patcher(ids, patch_size=4, threshold=0.0)
    between = entropy.sort().values[0, 29:31].mean().item()
    theirs.config.patching_threshold = ours.config.patches.threshold = between
    output, expected = ours(ids, use_cache=False), theirs(ids, use_cache=False)
    assert 25 < output.num_patches.item() < 35
    assert_close(output.logits[:, :-1].float(), expected.logits[:, :-1], rtol=1e-6, atol=1e-6)
