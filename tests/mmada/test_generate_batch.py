"""Many completions at once: the same as one by one, as a full forward pass says, and as transformers' ``generate``."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from mmada.generate import SamplingSettings, generate_batch, generate_reference, score_cached
from mmada.tokenizer import ByteTokenizer
from tests.mmada.mixtures import every_mixture, make_mixture, random_ids

LENGTHS = [5, 1, 9, 3, 12, 7]
SEEDS = [[1, 2], [3], [4, 5, 6], [], [2**63 + 7], [-8, 1]]
NEW = 7
ENDS = list(range(8, 264, 8))  # one token in eight: completions end early, and some at once


def prompts_of(lengths):
    return [random_ids(1, length, seed=length)[0].tolist() for length in lengths]


PROMPTS = prompts_of(LENGTHS)


def doubles(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@torch.no_grad()
def full_pass(model, prompt, ids, temperature=1.0):
    """Log-probabilities of ``ids`` behind the prompt by one forward pass without a cache."""
    logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(wide) / temperature).log_softmax(-1)[torch.arange(len(ids)), ids]


def same(made, others, atol=1e-9):
    """Ids and ends are equal, and log-probabilities but for rounding."""
    for own, other in zip(made, others, strict=True):
        assert [(c.ids, c.finish) for c in own] == [(c.ids, c.finish) for c in other]
        for ours, theirs in zip(own, other, strict=True):
            assert_close(doubles(ours.logprobs), doubles(theirs.logprobs), rtol=0, atol=atol)
            assert_close(doubles(ours.sampling_logprobs), doubles(theirs.sampling_logprobs), rtol=0, atol=atol)


@every_mixture
def test_a_completion_is_the_same_whatever_is_beside_it(name):
    """Few slots, one, and, with the prompts in another order, more than there are samples."""
    model = make_mixture(name, eos_token_id=ENDS)
    settings = SamplingSettings(NEW, temperature=1.2, top_k=100, top_p=0.95)
    made = generate_batch(model, PROMPTS, settings, seeds=SEEDS, slots=4)
    assert [len(own) for own in made] == [len(own) for own in SEEDS]
    same(made, generate_batch(model, PROMPTS, settings, seeds=SEEDS, slots=1))
    turned = generate_batch(model, PROMPTS[::-1], settings, seeds=SEEDS[::-1], slots=64)
    same(made, turned[::-1])
    assert {c.finish for own in made for c in own} == {"end", "length"}
    for prompt, own in zip(PROMPTS, made, strict=True):
        for completion in own:
            expected = full_pass(model, prompt, completion.ids, 1.2)
            assert_close(doubles(completion.logprobs), expected, rtol=0, atol=1e-9)
            assert completion.finish == ("end" if completion.ids[-1] in ENDS else "length")
            assert not set(completion.ids[:-1]) & set(ENDS)


@every_mixture
def test_greedy_is_what_transformers_generates(name):
    model = make_mixture(name, eos_token_id=ENDS)
    settings, seeds = SamplingSettings(NEW, temperature=0), [[0]] * len(PROMPTS)
    same(
        generate_batch(model, PROMPTS, settings, seeds=seeds, slots=3),
        generate_reference(model, PROMPTS, settings, seeds=seeds, slots=4),
        atol=1e-5,  # transformers turns logits into float32
    )


@every_mixture
def test_scores_through_the_cache_are_those_of_a_full_pass(name):
    model = make_mixture(name)
    completions = [random_ids(1, length, seed=50 + length)[0].tolist() for length in (4, 9, 1, 2, 6)] + [[]]
    scored = score_cached(model, PROMPTS, completions, temperature=0.7, slots=3)
    for prompt, ids, logprobs in zip(PROMPTS, completions, scored, strict=True):
        expected = full_pass(model, prompt, ids, 0.7) if ids else torch.empty(0).double()
        assert_close(doubles(logprobs), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["attention", "hybrid", "memory_layer", "experts", "patches-space"])
def test_in_float32(name):
    model = make_mixture(name, torch.float32)
    made = generate_batch(model, PROMPTS, SamplingSettings(NEW), seeds=SEEDS, slots=4)
    for prompt, own in zip(PROMPTS, made, strict=True):
        for completion in own:
            expected = full_pass(model, prompt, completion.ids)
            assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_a_prompt_is_fed_once_and_its_samples_share_what_it_left():
    model, fed = make_mixture("window"), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: fed.append(tuple(args[0].shape)))
    prompts = prompts_of([11, 11])
    generate_batch(model, prompts, SamplingSettings(3), seeds=[range(5), range(5)], slots=4)
    assert [shape for shape in fed if shape[1] > 1] == [(1, 11), (1, 11)]
    rows = [shape[0] for shape in fed if shape[1] == 1]
    assert max(rows) == 4 and sum(rows) == 2 * 5 * 2  # the first token comes of the prompt


def test_ends_that_come_at_once_take_no_slot():
    model = make_mixture("attention", eos_token_id=list(range(264)))
    made = generate_batch(model, PROMPTS, SamplingSettings(NEW), seeds=SEEDS, slots=2)
    assert all(len(c.ids) == 1 and c.finish == "end" for own in made for c in own)
    model = make_mixture("attention", eos_token_id=None)
    made = generate_batch(model, PROMPTS, SamplingSettings(1), seeds=SEEDS, slots=2)
    assert all(len(c.ids) == 1 and c.finish == "length" for own in made for c in own)


def test_an_end_token_in_the_prompt_ends_nothing():
    model = make_mixture("attention", eos_token_id=9)
    (made,), (apart,) = (
        generate_batch(model, [[9, 8, 9, 9]], SamplingSettings(4), seeds=[[3]], slots=1),
        generate_reference(model, [[9, 8, 9, 9]], SamplingSettings(4, temperature=0), seeds=[[3]]),
    )
    assert len(made[0].ids) == len(apart[0].ids) == 4


def test_seeds_are_drawn_from_torch_where_none_are_given():
    model, settings = make_mixture("attention"), SamplingSettings(NEW)
    torch.manual_seed(5)
    first = generate_batch(model, PROMPTS, settings, seeds=None)
    second = generate_batch(model, PROMPTS, settings, seeds=None)
    torch.manual_seed(5)
    same(first, generate_batch(model, PROMPTS, settings, seeds=None, slots=2))
    assert [len(own) for own in first] == [1] * len(PROMPTS)
    assert first != second
    assert generate_batch(model, [], settings, seeds=None) == []


def test_a_stop_text_ends_with_the_token_that_completes_it():
    """In bytes, where every letter is a token, beside rows that go on; and as transformers would."""
    model, tokenizer = make_mixture("ssm"), ByteTokenizer()
    plain = generate_batch(model, PROMPTS, SamplingSettings(20), seeds=SEEDS, slots=4)
    texts = [tokenizer.decode(own[0].ids, skip_special_tokens=True) for own in plain if own]
    stop = tuple({text[at : at + 2] for text in texts[:3] for at in range(4, 8) if text[at : at + 2].isascii()})
    settings = SamplingSettings(20, stop=stop)
    made = generate_batch(model, PROMPTS, settings, seeds=SEEDS, slots=4, tokenizer=tokenizer)
    assert {completion.finish for own in made for completion in own} >= {"stop", "length"}
    for own, uncut in zip(made, plain, strict=True):
        for completion, whole in zip(own, uncut, strict=True):
            text = tokenizer.decode(completion.ids, skip_special_tokens=True)
            assert whole.ids[: len(completion.ids)] == completion.ids
            assert (completion.finish == "stop") == text.endswith(stop)
            assert not any(each in text[:-1] for each in stop)
    (whole,) = generate_batch(model, PROMPTS[:1], SamplingSettings(20, temperature=0), seeds=None)
    ascii_id = next(token for token in whole[0].ids[1:] if 8 <= token < 136)
    cut = SamplingSettings(20, temperature=0, stop=(chr(ascii_id - 8), "never"))
    ours = generate_batch(model, PROMPTS[:3], cut, seeds=None, tokenizer=tokenizer)
    assert ours[0][0].finish == "stop"
    same(ours, generate_reference(model, PROMPTS[:3], cut, seeds=None, tokenizer=tokenizer), atol=1e-5)


def subword_tokenizer():
    """A byte-level BPE, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the end of the banana and the end of the band"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_stop_text_may_begin_and_end_inside_of_subwords():
    tokenizer = subword_tokenizer()
    model = make_mixture("attention", vocab_size=len(tokenizer), eos_token_id=None)
    settings = SamplingSettings(30, temperature=2.0)
    (plain,) = generate_batch(model, PROMPTS[:1], settings, seeds=[range(8)])
    texts = [tokenizer.decode(completion.ids) for completion in plain]
    stop = next(text[4:7] for text in texts if text[4:7].isascii() and len(text) > 7)
    settings = SamplingSettings(30, temperature=2.0, stop=(stop,))
    (made,) = generate_batch(model, PROMPTS[:1], settings, seeds=[range(8)], tokenizer=tokenizer)
    assert "stop" in {completion.finish for completion in made}
    for completion, whole in zip(made, plain, strict=True):
        assert completion.ids == whole.ids[: len(completion.ids)]
        assert (stop in tokenizer.decode(completion.ids)) == (completion.finish == "stop")
        assert stop not in tokenizer.decode(completion.ids[:-1])


def test_a_model_with_adapters_and_one_in_half_precision():
    model = make_mixture("attention", torch.float32)
    plain = generate_batch(model, PROMPTS, SamplingSettings(4), seeds=SEEDS)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    made = generate_batch(adapted, PROMPTS, SamplingSettings(4), seeds=SEEDS)
    assert made != plain
    assert_close(torch.tensor(made[0][0].logprobs), full_pass(adapted, PROMPTS[0], made[0][0].ids), rtol=0, atol=1e-5)
    half = make_mixture("hybrid", torch.bfloat16)
    made = generate_batch(half, PROMPTS, SamplingSettings(4), seeds=SEEDS, slots=3)
    scored = score_cached(half, PROMPTS[:1], [made[0][0].ids])
    assert_close(torch.tensor(made[0][0].logprobs), torch.tensor(scored[0]), rtol=0, atol=0.2)


class TestRefusals:
    settings = SamplingSettings(8)

    @pytest.mark.parametrize(
        ("prompts", "message"),
        [
            ([[9], []], r"prompts\[1\] is empty; give at least one token"),
            ([[9], [9, 264]], r"prompts\[1\] holds the id 264, but vocab_size=264"),
            ([[-1]], r"prompts\[0\] holds the id -1"),
            (
                [[9] * 57],
                r"prompts\[0\] has 57 tokens and 8 shall follow, but max_position_embeddings=64; use at most 56",
            ),
        ],
    )
    def test_prompts(self, prompts, message):
        model = make_mixture("attention", max_position_embeddings=64)
        for generate in (generate_batch, generate_reference):
            with pytest.raises(ValueError, match=message):
                generate(model, prompts, self.settings, seeds=None)
        assert len(generate_batch(model, [[9] * 56], self.settings, seeds=[[1]])[0][0].ids) == 8

    def test_everything_else(self):
        model = make_mixture("attention")
        with pytest.raises(ValueError, match="seeds for 1 prompts and 2 prompts"):
            generate_batch(model, [[9], [9]], self.settings, seeds=[[1]])
        with pytest.raises(ValueError, match="slots=0"):
            generate_batch(model, [[9]], self.settings, seeds=None, slots=0)
        with pytest.raises(ValueError, match=r"stop=\('x',\).*give the tokenizer"):
            generate_batch(model, [[9]], SamplingSettings(8, stop=("x",)), seeds=None)
        with pytest.raises(ValueError, match="1 completions for 2 prompts"):
            score_cached(model, [[9], [9]], [[8]])
        with pytest.raises(ValueError, match=r"completions\[0\] holds the id 999"):
            score_cached(model, [[9]], [[8, 999]])
        with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
            generate_batch(model.train(), [[9]], self.settings, seeds=None)

    def test_a_model_that_has_gone_astray(self):
        model = make_mixture("attention")
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        with pytest.raises(ValueError, match=r"prompts\[0\]: the model's logits are not finite"):
            generate_batch(model, [[9]], self.settings, seeds=None)
