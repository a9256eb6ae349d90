"""Sampling draws from the distribution it should: every sequence of a tiny vocabulary, counted; and what top-k cuts."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch.testing import assert_close
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from mmada.generate import SamplingSettings, generate_batch, generate_reference
from mmada.generation.sampling import as_int64, draw, invert, truncated, uniform
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config

END, LENGTH, PROMPT = 3, 3, [1, 2, 0, 1]


@pytest.fixture(scope="module")
def tiny_model():
    """Four tokens, of which the last ends a text, and what comes next depends much on what came."""
    torch.manual_seed(1)
    config = build_config(
        "debug", vocab_size=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1,
        intermediate_size=32, num_experts=0, initializer_range=0.6, eos_token_id=END,
    )  # fmt: skip
    return MMaDAForCausalLM(config).eval()


@torch.no_grad()
def probabilities(model, settings, begun=()):
    """Of every completion, by full forward passes and transformers' own truncation."""
    if len(begun) == LENGTH or END in begun:
        return {tuple(begun): 1.0}
    scores = model(torch.tensor([[*PROMPT, *begun]])).logits[:, -1] / settings.temperature
    if settings.top_k:
        scores = TopKLogitsWarper(settings.top_k)(None, scores)
    if settings.top_p < 1:
        scores = TopPLogitsWarper(settings.top_p)(None, scores)
    table = {}
    for token, probability in enumerate(scores.softmax(-1)[0].tolist()):
        if probability > 0:
            rest = probabilities(model, settings, (*begun, token))
            table.update({ids: probability * share for ids, share in rest.items()})
    return table


def p_value(counts, table):
    """Of the chi-square test; sequences that are expected fewer than five times count together."""
    assert set(counts) <= set(table)
    total = sum(counts.values())
    common = {ids: share for ids, share in table.items() if share * total >= 5}
    observed = [counts[ids] for ids in common]
    expected = [share * total for share in common.values()]
    if total - sum(expected) > 1e-6 * total:
        observed.append(total - sum(observed))
        expected.append(total - sum(expected))
    return chisquare(observed, expected, sum_check=False).pvalue


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(LENGTH),
        SamplingSettings(LENGTH, temperature=0.6),
        SamplingSettings(LENGTH, temperature=1.5, top_k=2),
        SamplingSettings(LENGTH, temperature=0.8, top_p=0.9),
        SamplingSettings(LENGTH, temperature=1.3, top_k=3, top_p=0.8),
    ],
    ids=lambda settings: f"T{settings.temperature}-k{settings.top_k}-p{settings.top_p}",
)
@pytest.mark.parametrize("generate", [generate_batch, generate_reference])
def test_every_sequence_comes_as_often_as_it_should(tiny_model, settings, generate):
    torch.manual_seed(0)
    num_samples = 4000
    (made,) = generate(tiny_model, [PROMPT], settings, seeds=[range(num_samples)], slots=1000)
    counts = Counter(tuple(completion.ids) for completion in made)
    table = probabilities(tiny_model, settings)
    assert sum(table.values()) == pytest.approx(1)
    assert p_value(counts, table) > 1e-3
    colder = SamplingSettings(LENGTH, 0.7 * settings.temperature, settings.top_k, settings.top_p)
    wrong = {ids: probabilities(tiny_model, colder).get(ids, 1e-9) for ids in table}
    assert p_value(counts, wrong) < 1e-6  # the test would see it
    for completion in made[:50]:
        assert sum(completion.sampling_logprobs) == pytest.approx(
            torch.tensor(table[tuple(completion.ids)]).log().item(), abs=1e-4
        )


def test_noise_is_even_and_without_memory():
    """Over seeds at one place, over places with one seed, and from one place to the next."""
    many, one = torch.arange(40_000), torch.full((40_000,), 7)
    for seeds, index in ((many, one), (one, many)):
        numbers = uniform(seeds, index)
        assert numbers.min() > 0 and numbers.max() < 1
        counts = torch.histc(numbers, bins=64, min=0, max=1)
        assert chisquare(counts.numpy()).pvalue > 1e-3
    for other in (uniform(many, one + 1), uniform(many + 1, one)):
        assert torch.corrcoef(torch.stack([uniform(many, one), other]))[0, 1].abs() < 0.02
    assert torch.equal(uniform(as_int64([-1, 2**64 - 1], many.device), one[:2]), uniform(one[:2] * 0 - 1, one[:2]))


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (40, 1.0), (0, 0.01), (0, 0.5), (0, 0.95), (7, 0.6)])
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_truncation_is_transformers_own(top_k, top_p, step):
    """With a step, scores are rounded to it: many tie."""
    scores = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(top_k))
    scores = (scores / step).round() * step if step else scores
    expected = scores
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(truncated(scores, top_k, top_p), expected)
    assert truncated(scores, 0, 1.0) is scores


def test_the_ends_of_the_noise_fall_on_tokens_that_have_a_probability():
    logprobs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).log().expand(3, -1)
    ends = torch.tensor([5e-324, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert invert(logprobs, ends).tolist() == [1, 3, 3]
    assert invert(logprobs, torch.tensor([0.29, 0.31, 0.99]).double()).tolist() == [1, 3, 3]


def test_greedy_takes_the_likeliest_and_says_what_it_was_worth():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]])
    drawn = draw(logits, torch.tensor([1, 2]), torch.tensor([0, 0]), SamplingSettings(1, temperature=0))
    assert drawn.tokens_B.tolist() == [1, 0]
    assert_close(drawn.logprobs_B, logits.log_softmax(-1)[torch.arange(2), drawn.tokens_B])
    assert drawn.sampling_logprobs_B.tolist() == [0, 0]


def test_half_precision_logits_are_drawn_from_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    drawn = draw(logits, torch.arange(4), torch.zeros(4, dtype=torch.long), SamplingSettings(1, temperature=0.7))
    expected = (logits.float() / 0.7).log_softmax(-1)[torch.arange(4), drawn.tokens_B]
    assert drawn.logprobs_B.dtype == torch.float32 and torch.equal(drawn.logprobs_B, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop", ""),
        ("stop", ("",)),
    ],
)
def test_settings_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        SamplingSettings(**{"max_new_tokens": 4, field: value})
