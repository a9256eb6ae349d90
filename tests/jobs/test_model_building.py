"""The model that a recipe asks for."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jobs.model_building import build_model
from jobs.recipe import load_recipe


def save_subword_tokenizer(folder):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["words and words and words"] * 4, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)


def test_special_ids_are_the_tokenizers(tmp_path):
    save_subword_tokenizer(tmp_path)
    keys = ["run.name=x", "model.vocab_size=300", f"data.tokenizer={tmp_path}"]
    model = build_model(load_recipe("debug", keys))
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (None, None, 0)
    assert model.generation_config.eos_token_id == 0
    assert model.model.embed_tokens.padding_idx is None
    assert model.model.embed_tokens.weight[0].abs().max() > 0
    chosen = build_model(load_recipe("debug", [*keys, "model.eos_token_id=7"]))
    assert chosen.config.eos_token_id == 7
    own = build_model(load_recipe("debug", ["run.name=x"]))
    assert (own.config.pad_token_id, own.config.bos_token_id, own.config.eos_token_id) == (0, 1, 2)


def test_weights_are_a_function_of_the_seed_alone():
    states = [build_model(load_recipe("debug", [f"run.seed={seed}"])).state_dict() for seed in (0, 0, 1)]
    torch.rand(1)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["model.embed_tokens.weight"], states[2]["model.embed_tokens.weight"])
