"""Noise on the input embeddings: how much of it, where it comes from, and that evaluation knows nothing of it."""

import pytest
import torch
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.robustness import InputNoise
from mmada.nn.router import counter_uniform
from mmada.presets import build_config

D = 16
NOISY = {"embedding_dropout": 0.15, "token_mask_probability": 0.1}


def make_noise(**settings):
    torch.manual_seed(0)
    return InputNoise(MMaDAConfig(hidden_size=D, num_attention_heads=2, **settings)).double()


def make_model(**settings):
    torch.manual_seed(0)
    config = build_config("debug", **{"num_experts": 0, "initializer_range": 0.2} | settings)
    return MMaDAForCausalLM._from_config(config, dtype=torch.float64)


def ids(batch, length):
    return torch.randint(8, 264, (batch, length), generator=torch.Generator().manual_seed(1))


def test_counter_uniform_is_even_and_a_pure_function_of_its_key():
    keys = torch.arange(100_000)
    sample = counter_uniform(keys, 3, stream=-2)
    assert sample.min() > 0 and sample.max() < 1
    counts = torch.histc(sample, bins=20, min=0, max=1)
    assert (counts / 15_000 - 1).abs().max() < 0.05  # six standard deviations of a bin
    others = torch.cat([sample.T, counter_uniform(keys, 3, stream=-1).T])
    assert (torch.corrcoef(others) - torch.eye(6)).abs().max() < 0.02
    picked = torch.tensor([17, 4, 4999])
    assert torch.equal(counter_uniform(keys[picked], 3, stream=-2), sample[picked])


def test_a_share_of_the_tokens_becomes_the_learned_vector():
    noise, embeddings = make_noise(token_mask_probability=0.1), torch.randn(4, 5000, D, dtype=torch.float64)
    embeddings.requires_grad_()
    noisy = noise(embeddings, torch.arange(20_000))
    masked = (noisy == noise.mask_embedding).all(-1)
    assert masked.double().mean().item() == pytest.approx(0.1, abs=0.008)
    assert torch.equal(noisy[~masked], embeddings[~masked])
    direction = torch.randn_like(noisy)
    (noisy * direction).sum().backward()
    assert_close(noise.mask_embedding.grad, direction[masked].sum(0), rtol=1e-6, atol=1e-9)
    assert_close(embeddings.grad, direction * ~masked[..., None], rtol=0, atol=0)


def test_dropout_takes_single_elements_and_keeps_the_mean():
    noise, embeddings = make_noise(embedding_dropout=0.25), torch.ones(4, 2500, D, dtype=torch.float64)
    noisy = noise(embeddings, torch.arange(10_000)).flatten(0, 1)
    assert set(noisy.unique().tolist()) == {0.0, 1 / 0.75}
    assert noisy.mean().item() == pytest.approx(1, abs=0.01)
    correlation = torch.corrcoef(noisy.T) - torch.eye(D)  # between the channels of a token
    assert correlation.abs().max() < 0.05


def test_evaluation_is_the_model_without_noise_bit_for_bit():
    noisy, plain, tokens = make_model(**NOISY).eval(), make_model().eval(), ids(2, 20)
    plain.load_state_dict(noisy.state_dict(), strict=False)
    assert torch.equal(noisy(tokens).logits, plain(tokens).logits)
    assert not torch.equal(noisy.train()(tokens).logits, plain.train()(tokens).logits)


def test_nothing_is_left_of_it_when_off():
    assert make_model().model.input_noise is None
    assert list(make_noise(embedding_dropout=0.1).parameters()) == []


def test_noise_follows_the_sample_and_not_the_batch_or_the_padding():
    model, tokens = make_model(**NOISY).train(), ids(3, 20)
    samples = torch.tensor([5, 6, 7])
    whole = model(tokens, sample_ids=samples).logits
    for row in range(3):
        alone = model(tokens[row : row + 1], sample_ids=samples[row : row + 1]).logits
        assert_close(alone[0], whole[row], rtol=1e-9, atol=1e-12)
    padded = torch.nn.functional.pad(tokens, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (4, 0))
    assert_close(model(padded, attention_mask=mask, sample_ids=samples).logits[:, 4:], whole, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(model(tokens, sample_ids=samples + 3).logits, whole)


def test_without_sample_ids_torchs_generator_decides():
    model, tokens, found = make_model(**NOISY).train(), ids(2, 12), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(tokens).logits)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_gradient_checkpointing_meets_the_same_noise():
    tokens, gradients = ids(2, 16), []
    for checkpointing in (False, True):
        model = make_model(**NOISY, num_experts=4).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, sample_ids=torch.tensor([5, 6]), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        assert model.model.input_noise.mask_embedding.grad.abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_learned_vector_starts_like_an_embedding():
    model = make_model(hidden_size=1024, token_mask_probability=0.1)
    assert model.model.input_noise.mask_embedding.std().item() == pytest.approx(0.2, rel=0.1)
