"""Positions: published values, and parity with transformers' models that have the same ones."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, T5Config
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from mmada.config import MMaDAConfig
from mmada.nn.masks import Visibility
from mmada.nn.positions import (
    RelativeBias,
    alibi_bias,
    alibi_slopes,
    relative_bucket,
    rotary_cos_sin,
    rotary_frequencies,
)

SHAPE = {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128, "max_position_embeddings": 4096}


def config_with(**rope):
    return MMaDAConfig(**SHAPE, rope_parameters={"rope_theta": 10_000.0, **rope})


def plain_visibility(length):
    return Visibility(query_BT=torch.arange(length)[None], num_keys=length)


def test_yarn_golden_values():
    """d=128, base 1e4, L0=4096, s=8: pairs to 20 as trained, pairs from 46 interpolated, logits 1.207944² as large."""
    plain, _ = rotary_frequencies(config_with())
    yarn, factor = rotary_frequencies(
        config_with(rope_type="yarn", factor=8.0, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
    )
    ratio = yarn / plain
    assert factor == pytest.approx(1.207944, abs=1e-6)
    assert_close(ratio[:21], torch.ones(21))
    assert_close(ratio[46:], torch.full((18,), 1 / 8))
    assert ratio[21] < 0.99 and ratio[45] > 1 / 8 + 0.01
    assert_close(ratio[33], torch.tensor(0.5 / 8 + 0.5))  # half way of the ramp from 20 to 46


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, _ = rotary_frequencies(config_with())
    scaled, factor = rotary_frequencies(config_with(rope_type="ntk", factor=4.0))
    assert factor == 1.0
    base = 10_000.0 * 4.0 ** (128 / 126)
    assert_close(scaled, 1 / base ** (torch.arange(0, 128, 2) / 128))
    assert_close(scaled[0], plain[0])
    assert_close(scaled[-1], plain[-1] / 4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 64,
            "long_factor": [float(2 + i) for i in range(64)],
            "original_max_position_embeddings": 4096,
            "factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("last", [4000, 6000])
def test_scalings_that_depend_on_the_length_follow_transformers(rope, last):
    """Within the trained length, and beyond it."""
    positions = torch.tensor([[0, 1, 77, last]])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 10_000.0, **rope}))
    expected = theirs(torch.zeros(1), positions)
    ours = rotary_cos_sin(config_with(**rope), positions, torch.float32)
    for mine, llamas in zip(ours, expected, strict=True):
        assert_close(mine, llamas, rtol=1e-5, atol=1e-5)


def test_alibi_golden_slopes():
    eight = [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(8) == eight
    assert alibi_slopes(12) == pytest.approx([*eight, 0.707107, 0.353553, 0.176777, 0.088388], abs=1e-6)
    assert alibi_slopes(1) == [2.0**-8]


@pytest.mark.parametrize("heads", [8, 12])
def test_alibi_punishes_distance_as_bloom_does(heads):
    """Bloom adds slope times the key's position, which differs by a number per row: the softmax is the same."""
    length = 21
    scores = torch.randn(heads, length, length, dtype=torch.float64)
    causal = torch.ones(length, length).tril().bool()
    bias = plain_visibility(length).bias(alibi_bias(heads, length, torch.float64, torch.device("cpu")))[0]
    assert bias[0, 20, 0] == -20 * alibi_slopes(heads)[0]  # further away weighs less
    theirs = build_alibi_tensor(torch.ones(1, length), heads, torch.float64)
    mine, blooms = ((scores + added).masked_fill(~causal, -math.inf).softmax(dim=-1) for added in (bias, theirs))
    assert_close(mine, blooms, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (7, 5), (2, 3)])
def test_relative_buckets_are_those_of_t5(buckets, furthest):
    distance = torch.arange(400)
    expected = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(relative_bucket(distance, buckets, furthest), expected)
    assert expected.max() == buckets - 1


def test_relative_bias_equals_t5s_decoder():
    torch.manual_seed(0)
    length = 150  # beyond the largest distance of 128
    theirs = T5Attention(T5Config(num_heads=6, is_decoder=True), has_relative_attention_bias=True)
    ours = RelativeBias(MMaDAConfig())
    ours.embedding.load_state_dict(theirs.relative_attention_bias.state_dict())
    expected = theirs.compute_bias(length, length)
    bias = plain_visibility(length).bias(ours(torch.device("cpu")))
    causal = torch.ones(length, length).tril().bool()
    assert_close(bias.where(causal, 0), expected.where(causal, 0))


def test_biases_count_token_numbers():
    """Of rows that had different numbers of tokens, after persistent keys, and of a part of the mask."""
    bias_HN = torch.arange(40.0).expand(2, -1)
    whole = Visibility(query_BT=torch.arange(30)[None], num_keys=30).bias(bias_HN)
    rows = Visibility(
        query_BT=torch.tensor([[3, 4], [9, 10]]), num_keys=13, past=9, past_B=torch.tensor([3, 9]), num_persistent=2
    ).bias(bias_HN)
    assert torch.equal(rows[:, :, :, :2], torch.zeros(2, 2, 2, 2))
    assert torch.equal(rows[0, :, :, 2:], whole[0, :, 3:5, :11])
    assert torch.equal(rows[1, :, :, 2:], whole[0, :, 9:11, :11])
    later = Visibility(query_BT=torch.arange(20, 30)[None], num_keys=15, past=20, offset=15)
    assert torch.equal(later.bias(bias_HN, slice(2, 7), slice(4, 15)), whole[:, :, 22:27, 19:30])
