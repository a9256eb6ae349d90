"""``mmada bench patches``: what is counted is what the rules say, and everything that a byte costs is in it."""

import json
from pydoc_data.topics import topics

import pytest
import torch

from jobs.bench import patches as bench
from jobs.bench.counting import count_flops
from jobs.cli import CommandError
from jobs.recipe import RecipeError
from mmada.model import MMaDAForCausalLM
from mmada.presets import build_config


class Rows:
    """Rows of given bytes, each one document."""

    sequence_length = 24

    def __init__(self, text: bytes):
        self.ids = torch.tensor([*text]).view(-1, 24) + 8

    def batch(self, indices):
        ids = self.ids[torch.from_numpy(indices)]
        positions = torch.arange(24).expand(ids.shape)
        return {"input_ids": ids, "shift_labels": ids.roll(-1, 1), "position_ids": positions}


def model_with(**patches) -> MMaDAForCausalLM:
    torch.manual_seed(0)
    config = build_config("debug", num_experts=0, patches={"local_size": 32, **patches})
    return MMaDAForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def test_patches_are_counted_as_they_are_cut():
    words = Rows(b"four words stand in here" * 20)
    # A patch ends after byte 0 and after the space behind each of the first four words.
    assert bench.count(model_with(mode="space"), words, 20)["bytes_per_patch"] == pytest.approx(24 / 5)
    # After bytes 0, 4, 8, 12, 16 and 20.
    assert bench.count(model_with(mode="static", size=4), words, 20)["steps_per_byte"] == pytest.approx(6 / 24)
    assert bench.count(model_with(mode="none"), words, 3)["bytes_per_patch"] == 1


@pytest.mark.parametrize("mode", ["none", "static", "entropy"])
def test_everything_that_a_byte_costs_is_in_it(mode):
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model, rows = model_with(mode=mode, threshold=5.0, entropy_model=small), Rows(bytes(range(24)) * 2)
    figures = bench.count(model, rows, 2)
    (batch,) = bench.batches(rows, 2)
    assert figures["flops"] * 48 == pytest.approx(count_flops(lambda: model(**batch, use_cache=False))[0])
    assert (figures["flops_entropy"] > 0) == (mode == "entropy")
    if mode == "none":  # two blocks of projections, scores and values, feed-forward; and the head
        config, width = model.config, 64
        projections = 2 * (2 + 2 * config.num_key_value_heads / config.num_attention_heads) * width**2
        block = projections + 2 * 2 * 24 * width + 2 * 3 * width * config.intermediate_size
        assert figures["flops_stack"] == pytest.approx(2 * block)
        assert figures["flops_bytes"] == pytest.approx(2 * width * config.vocab_size)


def test_a_quick_run_trains_its_entropy_model_and_prints_every_rule(tmp_path, capfd):
    for name, text in list(topics.items())[:12]:
        (tmp_path / f"{name}.txt").write_text(text)
    own = ["data.source=files", f"data.path={tmp_path}", "data.held_out=0.2"]
    assert bench.run(["--quick", "--threads", "1", "--json", str(tmp_path / "all.json"), *own]) == 0
    out, err = capfd.readouterr()
    written = json.loads((tmp_path / "all.json").read_text())
    assert [*written["modes"]] == ["none", "static", "space", "entropy"]
    assert written["modes"]["static"]["bytes_per_patch"] == pytest.approx(4, rel=0.1)
    assert err == "" and "after 2 steps" in out and all(f" {mode} " in out for mode in written["modes"])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(CommandError, match="--modes=spaces is no rule of patches; did you mean space?"):
        bench.run(["--modes", "spaces"])
    with pytest.raises(RecipeError, match=r"train\.stesp"):
        bench.run(["train.stesp=3"])
    with pytest.raises(RecipeError, match="recipe=bites"):
        bench.run(["--recipe", "bites"])
