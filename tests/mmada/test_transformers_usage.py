"""Every mixture of layers generates, scores and trains as transformers' users expect."""

import copy
import io
import logging
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DynamicCache,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from mmada.nn.cache import MMaDACache
from mmada.tokenizer import ByteTokenizer
from tests.mmada.mixtures import every_kind, is_patched, make_mixture, random_ids

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
NEW = 6
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": NEW}


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@every_kind
class TestGenerate:
    def test_left_padded_batch_equals_single_prompts(self, name):
        model, tokens = make_mixture(name), random_ids(3, 8)
        mask = torch.tensor([[0] * 3 + [1] * 5, [1] * 8, [0] * 7 + [1]])
        together = model.generate(tokens.where(mask == 1, 0), attention_mask=mask, **GREEDY)
        for row in range(3):
            alone = model.generate(tokens[row : row + 1, mask[row].bool()], **GREEDY)
            assert torch.equal(together[row, 8:], alone[0, -NEW:])

    def test_the_cache_changes_no_token(self, name):
        """Greedy, with four beams over a padded batch, and with a prompt that goes in in chunks."""
        model, tokens = make_mixture(name), random_ids(2, 8)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        for how in ({}, {"num_beams": 4, "num_return_sequences": 2}):
            with_cache, without = (
                model.generate(tokens, attention_mask=mask, use_cache=use_cache, **GREEDY, **how)
                for use_cache in (True, False)
            )
            assert torch.equal(with_cache, without)
        chunked = model.generate(tokens, attention_mask=mask, prefill_chunk_size=3, **GREEDY)
        assert torch.equal(chunked, model.generate(tokens, attention_mask=mask, **GREEDY))

    def test_samples_are_the_same_with_and_without_the_cache(self, name):
        model, tokens, samples = make_mixture(name), random_ids(1, 6), []
        for use_cache in (True, False):
            torch.manual_seed(3)
            samples.append(
                model.generate(
                    tokens,
                    do_sample=True,
                    top_k=50,
                    num_return_sequences=3,
                    max_new_tokens=6,
                    eos_token_id=None,
                    use_cache=use_cache,
                )  # fmt: skip
            )
        assert torch.equal(*samples)
        assert len(samples[0].unique(dim=0)) > 1

    def test_an_assistant_changes_no_token(self, name):
        """Another model of this mixture, which is right at times; one of another mixture; and looking up the prompt."""
        model = make_mixture(name)
        tokens = random_ids(1, 4).repeat(1, 3)
        plain = model.generate(tokens, **{**GREEDY, "max_new_tokens": 12})
        near = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        for how in ({"assistant_model": near}, {"assistant_model": make_mixture("attention")},
                    {"prompt_lookup_num_tokens": 3}):  # fmt: skip
            assert torch.equal(model.generate(tokens, **{**GREEDY, "max_new_tokens": 12}, **how), plain)

    @torch.no_grad()
    def test_contrastive_search_with_the_cache_finds_what_it_finds_without(self, name):
        """transformers fetches its own from the hub: as there, the cache is widened by candidates and cut to one."""
        model, tokens, best = make_mixture(name), random_ids(2, 6), 3
        results = []
        for cache in (MMaDACache(model.config.num_hidden_layers), None):
            said = tokens
            states = model.model(said, past_key_values=cache, use_cache=cache is not None).last_hidden_state
            for _ in range(NEW):
                chances, candidates = model.lm_head(states[:, -1]).softmax(-1).topk(best)
                if cache is not None:
                    cache.batch_repeat_interleave(best)
                    new = model.model(candidates.view(-1, 1), past_key_values=cache).last_hidden_state
                else:
                    longer = torch.cat([said.repeat_interleave(best, dim=0), candidates.view(-1, 1)], dim=1)
                    new = model.model(longer, use_cache=False).last_hidden_state[:, -1:]
                new = new.unflatten(0, (2, best))
                alike = torch.cosine_similarity(new, states[:, None], dim=-1).amax(dim=-1)
                chosen = (0.4 * chances - 0.6 * alike).argmax(dim=1)
                if cache is not None:
                    cache.batch_select_indices(torch.arange(2) * best + chosen)
                rows = torch.arange(2)
                said = torch.cat([said, candidates[rows, chosen][:, None]], dim=1)
                states = torch.cat([states, new[rows, chosen]], dim=1)
            results.append(said)
        assert torch.equal(*results)

    def test_a_conversation_goes_on_with_its_cache(self, name):
        model, tokens = make_mixture(name), random_ids(1, 5)
        cache = MMaDACache(model.config.num_hidden_layers)
        first = model.generate(tokens, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == first.shape[1] - 1
        said = torch.cat([first, random_ids(1, 4, seed=5)], dim=1)
        kept = copy.deepcopy(cache)
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        expected = model.generate(said, **GREEDY)
        for each in (cache, kept, torch.load(file, weights_only=False)):
            assert torch.equal(model.generate(said, past_key_values=each, **GREEDY), expected)

    def test_from_embeddings(self, name):
        model, tokens = make_mixture(name), random_ids(2, 6)
        if is_patched(name):  # what a byte is decides where patches end
            with pytest.raises(ValueError, match="inputs_embeds cannot be grouped"):
                model(inputs_embeds=model.get_input_embeddings()(tokens))
            return
        embeddings = model.get_input_embeddings()(tokens)
        assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits, **CLOSE)
        new = model.generate(inputs_embeds=embeddings, **GREEDY)
        assert torch.equal(new, model.generate(tokens, **GREEDY)[:, 6:])

    def test_hands_out_states_and_weights_of_every_step(self, name):
        """With a padded batch; a step's hidden states are those of the whole text."""
        model, tokens = make_mixture(name, attention="eager"), random_ids(2, 6)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        output = model.generate(tokens, attention_mask=mask, return_dict_in_generate=True, output_scores=True,
                                output_hidden_states=True, output_attentions=True, **GREEDY)  # fmt: skip
        assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == NEW
        assert isinstance(output.past_key_values, MMaDACache)
        mask = torch.nn.functional.pad(mask, (0, NEW - 1), value=1)
        whole = model(output.sequences[:, :-1], attention_mask=mask, output_hidden_states=True)
        for layer, expected in enumerate(() if is_patched(name) else whole.hidden_states):
            steps = torch.cat([step[layer][:, -1:] for step in output.hidden_states], dim=1)
            assert_close(steps, expected[:, 5:], **CLOSE)
        assert_close(torch.stack(output.scores, dim=1), whole.logits[:, 5:].float(), check_dtype=False)

    def test_under_autocast(self, name):
        model, tokens = make_mixture(name, torch.float32), random_ids(2, 12)
        expected = model(tokens).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(tokens, labels=tokens)
            assert model.generate(tokens, **GREEDY).shape == (2, 12 + NEW)
        error = (output.logits.float() - expected).pow(2).mean().sqrt() / expected.std()
        assert output.logits.dtype == torch.bfloat16 and error < 0.1
        output.loss.backward()
        assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in model.parameters())

    def test_says_nothing_that_was_not_asked(self, name, caplog, capsys, monkeypatch):
        """No warning, no log line, no print for ordinary calls; what is streamed is what is returned."""

        class Collect(BaseStreamer):
            def __init__(self):
                self.ids = []

            def put(self, value):
                self.ids += value.flatten().tolist()

            def end(self):
                self.ids.append("end")

        model, tokens, streamer = make_mixture(name, torch.float32), random_ids(1, 5), Collect()
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        transformers_logging.warning_once.cache_clear()
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            new = model.generate(tokens, max_new_tokens=4, do_sample=False, streamer=streamer)
            model.generate(tokens, generation_config=GenerationConfig(max_new_tokens=3, do_sample=True, pad_token_id=0))
            model.generate(tokens, attention_mask=torch.ones_like(tokens), num_beams=2, max_length=9)
            model(tokens, labels=tokens).loss.backward()
        assert streamer.ids == [*new[0].tolist(), "end"]
        assert caplog.records == [] and capsys.readouterr() == ("", "")
        model.generate(tokens, max_new_tokens=1, do_sample=False, temperature=0.5)
        assert "temperature" in caplog.text  # a warning would have been caught


@every_kind
@torch.no_grad()
def test_scoring_batches_padded_on_the_right(name):
    """As evaluation harnesses do: logits of the real columns of a batch."""
    model, tokens = make_mixture(name), random_ids(3, 10)
    mask = (torch.arange(10) < torch.tensor([10, 4, 7])[:, None]).long()
    logits = model(tokens, attention_mask=mask).logits
    without_mask = model(tokens).logits  # causal: what is behind a token does not change it
    for row, length in enumerate([10, 4, 7]):
        alone = model(tokens[row : row + 1, :length]).logits
        assert_close(logits[row : row + 1, :length], alone, **CLOSE)
        assert_close(without_mask[row : row + 1, :length], alone, **CLOSE)


@every_kind
def test_pipeline_with_the_byte_tokenizer(name, tmp_path):
    model = make_mixture(name, torch.float32)
    model.save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    texts = generator(["Hello", "Grüße an alle"], max_new_tokens=5, do_sample=False, batch_size=2)
    for (answer,), prompt in zip(texts, ["Hello", "Grüße an alle"], strict=True):
        ids = ByteTokenizer()(prompt, return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer["generated_text"] == prompt + ByteTokenizer().decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["experts", "hybrid"])
def test_trainer_trains_saves_and_resumes(name, tmp_path):
    """transformers' Trainer with gradient checkpointing and rows of different lengths, padded by its collator."""
    rows = [{"input_ids": random_ids(1, 4 + i, seed=i)[0].tolist()} for i in range(8)]
    collator = DataCollatorForLanguageModeling(ByteTokenizer(), mlm=False)
    finished = []
    for steps in ((4,), (2, 4)):
        model = make_mixture(name, torch.float32, router_noise=False)
        for step in steps:
            folder = tmp_path / str(len(steps))
            arguments = TrainingArguments(folder, max_steps=4, per_device_train_batch_size=2, save_steps=2, seed=1,
                                          report_to=[], activation_checkpointing=True, disable_tqdm=True, use_cpu=True,
                                          learning_rate=1e-3, logging_steps=1, dataloader_num_workers=0)  # fmt: skip
            trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
            if step == 2:
                trainer.add_callback(StopAfter(2))
            trainer.train(resume_from_checkpoint=step == 4 and len(steps) == 2)
        finished.append(model.state_dict())
    assert_close(finished[1], finished[0], rtol=1e-5, atol=1e-6)
    start = make_mixture(name, torch.float32, router_noise=False).lm_head.weight
    assert (finished[0]["lm_head.weight"] - start).abs().max() > 1e-3


class TestRefusals:
    """What cannot be done is refused by name, not done wrongly."""

    def test_caches_of_another_kind(self):
        model, tokens = make_mixture("attention"), random_ids(1, 4)
        with pytest.raises(ValueError, match="DynamicCache.*MMaDACache"):
            model(tokens, past_key_values=DynamicCache())
        with pytest.raises(ValueError, match="DynamicCache.*MMaDACache"):
            model.generate(tokens, past_key_values=DynamicCache(), max_new_tokens=2)
        with pytest.raises(ValueError, match="cache_implementation=static"):
            model.generate(tokens, cache_implementation="static", max_new_tokens=2)
        assert model.generate(tokens, cache_implementation="dynamic", max_new_tokens=2).shape[1] <= 6

    def test_inputs_that_are_none(self):
        model, tokens = make_mixture("attention"), random_ids(1, 4)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model()
        with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
            model(tokens[:, :0])
        with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 3\)"):
            model(tokens, attention_mask=torch.ones(1, 3))

    def test_tuples_instead_of_outputs(self):
        model, tokens = make_mixture("attention"), random_ids(1, 4)
        expected = model(tokens).logits
        assert torch.equal(model(tokens, return_dict=False)[0], expected)
        assert torch.equal(model.lm_head(model.model(tokens, return_dict=False)[0]), expected)
        model.config.return_dict = False
        assert torch.equal(model(tokens)[0], expected)
