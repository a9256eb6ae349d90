"""Where no gradients are recorded attention goes shorter ways: they lead to where the long ones do."""

import pytest
import torch
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmada.nn.attention.attend import one_token
from mmada.nn.attention.scoring import Scoring
from mmada.nn.mixers.attention import Attention
from tests.mmada.mixtures import config_of, every_mixture, make_mixture, random_ids

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("mask", ["none", "true or false", "a bias of all heads", "a bias of each head"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_token_is_what_transformers_makes_of_it(mask, kv_heads):
    module = Attention(config_of("attention", num_key_value_heads=kv_heads), 0)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 3, kv_heads, 9, 8, generator=generator)
    seen = torch.arange(9) < torch.tensor([9, 4, 1])[:, None, None, None]
    bias = torch.randn(3, 4 if "each" in mask else 1, 1, 9, generator=generator).masked_fill(~seen, -torch.inf)
    given = {"none": None, "true or false": seen}.get(mask, bias)
    expected, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, given, scaling=0.3)
    assert_close(one_token(query, key, value, given, Scoring(scaling=0.3)), expected, rtol=1e-6, atol=1e-6)


@every_mixture
def test_padding_behind_rows_and_single_tokens(name):
    """With gradients, which go the long way, and without; the states that the cache is left with count, too."""
    model, tokens = make_mixture(name), random_ids(3, 9)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    results = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            first = model(tokens, attention_mask=mask, use_cache=True)
            steps = [model(random_ids(3, 1, seed=step), past_key_values=first.past_key_values) for step in range(3)]
        logits = torch.cat([first.logits, *(step.logits for step in steps)], dim=1).detach()
        results.append(logits[torch.nn.functional.pad(mask, (0, 3), value=1).bool()])
    assert_close(results[1], results[0], **CLOSE)
