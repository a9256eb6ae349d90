"""The policy that a run begins with is a model's files and nothing that lies beside them."""

from pathlib import Path

import pytest

from jobs.rl.learner import link_files
from jobs.rl.policy_source import REFERENCE, write_reference
from mmada.data import load_tokenizer
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config
from tests.jobs.rl.experiences import small_recipe


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A saved model as tools leave one that they have downloaded."""
    folder = tmp_path / "downloaded"
    MMaDAForCausalLM._from_config(build_config("debug", num_experts=0)).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    (folder / ".cache" / "locks").mkdir(parents=True)
    (folder / ".cache" / "locks" / "one").write_text("")
    return folder


def test_folders_beside_a_model_are_left_behind(tmp_path: Path, start: Path):
    recipe = small_recipe(tmp_path, **{"ppo.start_from": start})
    reference = tmp_path / REFERENCE
    write_reference(recipe, reference)
    assert {path.name for path in reference.iterdir()} == {path.name for path in start.iterdir()} - {".cache"}
    link_files(reference, tmp_path / "in-a-checkpoint")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (start, tmp_path / "in-a-checkpoint")]
    assert weights[0] == weights[1]
