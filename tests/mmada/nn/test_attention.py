"""Attention against transformers' Llama, values and gradients, in float64."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from mmada.config import MMaDAConfig
from mmada.nn.mixers.attention import Attention
from tests.mmada.nn.layers import make_context, run_mixer

SHAPE = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
    "attention_bias": True,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(params=sorted(ROPES))
def pair(request):
    torch.manual_seed(0)
    ours_config = MMaDAConfig(**SHAPE, rope_parameters=dict(ROPES[request.param]))
    theirs_config = LlamaConfig(**SHAPE, rope_parameters=dict(ROPES[request.param]))
    for config in (ours_config, theirs_config):
        config._attn_implementation = "sdpa"
    ours, theirs = Attention(ours_config, 0).double(), LlamaAttention(theirs_config, 0).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, LlamaRotaryEmbedding(theirs_config)


def test_equals_llama_by_value_and_gradient(pair):
    ours, theirs, llama_rotary = pair
    position_ids = torch.arange(29)[None].expand(2, -1)
    states = torch.randn(2, 29, 48, dtype=torch.float64)
    direction = torch.randn(2, 29, 48, dtype=torch.float64)
    outputs, gradients = [], []
    for attention in (ours, theirs):
        own = states.clone().requires_grad_()
        if attention is ours:
            output = run_mixer(ours, own)
        else:
            mask = create_causal_mask(
                config=theirs.config, inputs_embeds=own, attention_mask=None, past_key_values=None, position_ids=None
            )
            rotary = llama_rotary(own, position_ids)
            output, _ = theirs(own, position_embeddings=rotary, attention_mask=mask)
        (output * direction).sum().backward()
        outputs.append(output)
        gradients.append([own.grad] + [p.grad for p in attention.parameters()])
    assert_close(*outputs, rtol=1e-6, atol=1e-9)
    for mine, llamas in zip(*gradients, strict=True):
        assert_close(mine, llamas, rtol=1e-6, atol=1e-9)


def test_eager_equals_sdpa_and_returns_weights_that_sum_to_one(pair):
    ours, _, _ = pair
    states = torch.randn(1, 17, 48, dtype=torch.float64)
    results = {}
    for kernel in ("sdpa", "eager"):
        ours.config._attn_implementation = kernel
        results[kernel] = ours(states, make_context(ours.config, 1, 17))
    assert_close(results["eager"][0], results["sdpa"][0], rtol=1e-6, atol=1e-9)
    weights_BHTS = results["eager"][1]
    assert weights_BHTS.shape == (1, 6, 17, 17)
    assert_close(weights_BHTS.sum(-1), torch.ones(1, 6, 17, dtype=torch.float64))
    assert weights_BHTS.triu(1).abs().max() == 0
