"""Text as it is typed: drawn from the whole distribution, the same for the same seed."""

from pathlib import Path

import pytest
import torch

from mmada.data import load_tokenizer
from mmada.generate import stream_text
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds all tokens nearly as likely as each other, whatever stands before."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = MMaDAForCausalLM._from_config(build_config("debug", num_experts=0, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.norm.weight.zero_()  # every state is 0
    model.save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def text(folder: Path, seed: int, **settings: float) -> str:
    return "".join(
        stream_text(folder, "a", max_new_tokens=150, seed=seed, **{"temperature": 1.0, "top_p": 1.0} | settings)
    )


def test_any_token_may_come(folder: Path, monkeypatch):
    """transformers leaves all but the 50 likeliest out unless it is told otherwise."""

    def refuse(*arguments, **settings):
        raise AssertionError("tokens were left out")

    monkeypatch.setattr("transformers.generation.utils.TopKLogitsWarper", refuse)
    assert len(text(folder, seed=0)) > 10


def test_a_seed_says_what_comes(folder: Path):
    assert text(folder, seed=1) == text(folder, seed=1) != text(folder, seed=2)
    assert text(folder, seed=1, temperature=0) == text(folder, seed=2, temperature=0)
