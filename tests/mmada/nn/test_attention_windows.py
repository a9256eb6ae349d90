"""Windows: how many keys they hold, how heads share them out, and what the cache keeps of them."""

import pytest
import torch
from torch.testing import assert_close
from transformers.masking_utils import sliding_window_causal_mask_function

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache
from mmada.nn.masks import Visibility
from mmada.nn.mixers.attention import Attention
from tests.mmada.nn.attention_layers import make_attention, random_states, value_and_gradients
from tests.mmada.nn.layers import make_context, run_mixer

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("window", [1, 4, 12, 20])
def test_a_window_holds_as_many_keys_as_transformers_says(window):
    """Itself among them: 0 <= q - k < window."""
    rule = sliding_window_causal_mask_function(window)
    expected = torch.tensor([[bool(rule(0, 0, q, k)) for k in range(12)] for q in torch.arange(12)])
    mask = Visibility(query_BT=torch.arange(12)[None], num_keys=12, window=window).mask()[0, 0]
    assert torch.equal(mask, expected)
    assert mask[11].sum() == min(window, 12)


def test_coverage_says_what_the_mask_says():
    documents = torch.tensor([[0] * 9 + [1] * 21])
    numbers = torch.arange(30)[None]
    for visibility in (
        Visibility(numbers, 30),
        Visibility(numbers, 32, window=7, num_persistent=2),
        Visibility(numbers, 30, documents_BT=documents),
        Visibility(numbers + 10, 34, past=10, offset=6, window=9),
        Visibility(torch.stack([numbers[0] + 4, numbers[0] + 20]), 50, past=20, past_B=torch.tensor([4, 20]), window=8),
    ):
        said = {True: 0, False: 0, None: 0}
        for first_query in range(0, 30, 5):
            for first_key in range(0, visibility.num_keys - 4, 4):
                queries, keys = slice(first_query, first_query + 5), slice(first_key, first_key + 4)
                covered, mask = visibility.coverage(queries, keys), visibility.mask(queries, keys)
                assert torch.equal(mask, visibility.mask()[:, :, queries, keys])
                assert covered is None or bool(mask.all() if covered else not mask.any())
                said[covered] += 1
        assert said[False] and said[None]


def test_the_heads_of_each_scale_see_their_own_window():
    """Against the whole scores with a mask per head; the weights with forgotten keys in front, too."""
    sizes = {"window_sizes": [3, 40, -1, 9], "position_embedding_type": "alibi"}
    layer, states = make_attention("multiscale", "eager", **sizes), random_states(2, 70)
    distance = torch.arange(70)[:, None] - torch.arange(70)
    windows = torch.tensor([3, 40, 70, 9]).repeat_interleave(2)[:, None, None]
    per_head = (distance >= 0) & (distance < windows)
    context = make_context(layer.config, 2, 70)
    output, weights = layer(states, context, None)
    assert torch.equal(weights != 0, per_head.expand(2, -1, -1, -1))
    plain = make_attention("attention", "eager", **sizes)
    plain_weights = plain(states, make_context(plain.config, 2, 70), None)[1]
    expected = plain_weights.masked_fill(~per_head, 0)
    assert_close(weights, expected / expected.sum(dim=-1, keepdim=True), **CLOSE)
    for kernel in ("sdpa", "blockwise"):
        other = make_attention("multiscale", kernel, **sizes)
        for a, b in zip(value_and_gradients(other, states), value_and_gradients(layer, states), strict=True):
            assert_close(a, b, **CLOSE)
    cache = MMaDACache(1)
    run_mixer(layer, states[:, :69], cache=cache)
    last = layer(states[:, 69:], make_context(layer.config, 2, 1, cache=cache), cache)
    assert_close(last[0], output[:, 69:], **CLOSE)
    assert_close(last[1], weights[:, :, 69:], **CLOSE)
    assert {name: part.keys.shape[2] for name, part in cache.layers[0].parts.items()} == {
        "key_values.0": 3,
        "key_values.1": 40,
        "key_values.2": 70,
        "key_values.3": 9,
    }


def test_heads_whose_kernel_knows_its_weights_stand_beside_others():
    """sdpa hands sparsemax on to the formula, which goes over all scores of one group and over bands of another."""
    layers = [make_attention("multiscale", kernel, attention_normalizer="sparsemax") for kernel in ("sdpa", "eager")]
    for length in (20, 70):
        states, context = random_states(2, length), make_context(layers[0].config, 2, length)
        (output, weights), (expected, _) = (layer(states, context, None) for layer in layers)
        assert_close(output, expected, **CLOSE)
        assert (weights is None) == (length == 70)


@torch.no_grad()
def kept_bytes(length, mixers, window=1024):
    """Bytes that the cache of a model with these layers keeps after a prompt."""
    cache = MMaDACache(len(mixers))
    for index, (kind, heads) in enumerate(mixers):
        config = MMaDAConfig(hidden_size=16, num_attention_heads=16, num_key_value_heads=heads, head_dim=4,
                             sliding_window=window)  # fmt: skip
        layer = Attention(config, index, kind=kind)
        layer(torch.zeros(1, length, 16), make_context(config, 1, length, torch.float32), cache)
    return cache.num_bytes()


def test_fewer_heads_and_windows_save_what_arithmetic_says():
    whole = kept_bytes(2048, [("attention", 16)] * 2)
    assert whole == 2 * 2 * 2048 * 16 * 4 * 4  # layers, keys and values, tokens, heads, width, bytes
    assert kept_bytes(2048, [("attention", 8)] * 2) == whole * 0.5
    assert kept_bytes(2048, [("attention", 4)] * 2) == whole * 0.25
    assert kept_bytes(2048, [("window", 8)] * 2) == whole * 0.25  # 75 % less
    assert kept_bytes(2048, [("window", 8), ("attention", 8)]) == whole * 0.375  # alternating: 62.5 % less
    # Five windows to one, at eight times the window: 86 % less.
    one_of_six = kept_bytes(512, [("window", 8)] * 5 + [("attention", 8)], window=64)
    assert one_of_six / kept_bytes(512, [("attention", 16)] * 6) == pytest.approx(0.1354, abs=1e-4)
