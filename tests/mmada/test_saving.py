"""Every mixture of layers is saved, loaded, cast, copied, resized and laid out over devices."""

import copy
import io
import logging
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM, MMaDAModel
from tests.mmada.mixtures import every_kind, is_patched, make_mixture, random_ids

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}


@every_kind
def test_one_file_or_many_through_the_auto_classes(name, tmp_path):
    model, tokens = make_mixture(name, torch.float32), random_ids(1, 9)
    model.generation_config.max_new_tokens = 3
    expected = model(tokens).logits
    for folder, size in (("one", "1GB"), ("many", "20KB")):
        model.save_pretrained(tmp_path / folder, max_shard_size=size)
        files = list((tmp_path / folder).glob("*.safetensors"))
        assert (len(files) == 1) == (folder == "one")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert type(loaded) is MMaDAForCausalLM and loaded.dtype == torch.float32 and not loaded.training
        assert torch.equal(loaded(tokens).logits, expected)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert loaded.generate(tokens, do_sample=False, eos_token_id=None).shape == (1, 12)
    body = AutoModel.from_pretrained(tmp_path / "one")
    assert type(body) is MMaDAModel
    assert torch.equal(body(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path / "many").to_dict() == loaded.config.to_dict()


@every_kind
def test_loaded_at_another_precision(name, tmp_path):
    model, tokens = make_mixture(name, torch.float32), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype
        assert torch.equal(loaded(tokens).logits, copy.deepcopy(model).to(dtype)(tokens).logits)


@every_kind
def test_attention_is_chosen_at_loading_and_later(name, tmp_path):
    model, tokens = make_mixture(name, attention="sdpa"), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    expected = model(tokens).logits
    for attention in ("eager", "blockwise"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert kernels_of(loaded) == {attention}
        assert_close(loaded(tokens).logits, expected, **CLOSE)
        with_cache, without = (loaded.generate(tokens, use_cache=on, **GREEDY) for on in (True, False))
        assert torch.equal(with_cache, without)
    loaded.set_attn_implementation("sdpa")
    assert_close(loaded(tokens).logits, expected, **CLOSE)
    assert kernels_of(loaded) == {"sdpa"}


def kernels_of(model):
    """What every part of the model has been told to compute attention with."""
    configs = [module.config for module in model.modules() if isinstance(getattr(module, "config", None), MMaDAConfig)]
    return {config._attn_implementation for config in configs}


@pytest.mark.parametrize("tie", [True, False])
@every_kind
def test_embeddings_tied_or_not_can_be_resized(name, tie, tmp_path):
    model, tokens = make_mixture(name, torch.float32, tie_word_embeddings=tie), random_ids(1, 9)
    expected = model(tokens).logits
    if model.config.patches.needs_entropy_model:
        with pytest.raises(ValueError, match="entropy model.*knows 264 tokens"):
            model.resize_token_embeddings(270)
        return
    model.resize_token_embeddings(270)
    assert model.config.vocab_size == 270
    assert torch.equal(model(tokens).logits[..., :264], expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(tokens).logits.shape[-1] == 270 and torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie


@every_kind
def test_a_saved_model_loads_without_a_word(name, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_mixture(name, torch.float32)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and caplog.records == []


@every_kind
def test_casts_and_copies(name):
    model, tokens = make_mixture(name, torch.float32), random_ids(1, 9)
    expected = model(tokens).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(tokens).logits, expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(tokens).logits, expected)
    assert_close(model.to(torch.float64)(tokens).logits.float(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.to(torch.float32)(tokens).logits, expected)


@every_kind
def test_laid_out_over_devices_by_hooks(name, tmp_path):
    """The weights of all blocks on disk: present only while the module that owns them runs."""
    model, tokens = make_mixture(name, torch.float32), random_ids(2, 7)
    model.save_pretrained(tmp_path)
    layout = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers": "disk"}
    if is_patched(name):
        layout["model.patches"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=layout, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))
