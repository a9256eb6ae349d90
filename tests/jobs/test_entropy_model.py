"""Byte patches in training: a recipe's entropy model is taken over, stays as it is, and is saved; every ZeRO stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.entropy_model import sample_entropies, settle_threshold
from jobs.model_building import build_model
from jobs.plan import model_size, stage_memory
from jobs.recipe import Recipe, RecipeError, load_recipe
from jobs.recipe_checks import check, checked_config
from jobs.worker_recipe import recipe_for_workers
from mmada.model import MMaDAForCausalLM
from mmada.nn.patches.boundaries import mean_patch_size
from mmada.presets import build_config
from mmada.tokenizer import ByteTokenizer
from tests.jobs.workers import bare_curve, run_all, small_recipe

STEPS, HALF = 6, 3
# (workers, ZeRO stage) of runs that stop, and of those that go on from them.
SOURCES = [(2, 2), (2, 3)]
PAIRS = [((2, 2), (1, 3)), ((2, 2), (2, 2)), ((2, 3), (1, 1)), ((2, 3), (2, 0)), ((2, 3), (2, 3))]


@pytest.fixture(scope="module")
def entropy_model(tmp_path_factory) -> Path:
    """A saved model of bytes, whose entropies differ from byte to byte."""
    folder = tmp_path_factory.mktemp("entropy-model")
    torch.manual_seed(5)
    config = build_config("debug", num_experts=0, hidden_size=32, intermediate_size=48, initializer_range=0.5)
    MMaDAForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


def recipe_for(run_dir, entropy_model, workers=1, zero_stage=1, **more):
    fixed = {
        "cluster.workers": workers,
        "cluster.expert_parallel": 1,
        "train.zero_stage": zero_stage,
        "train.steps": STEPS,
        "train.warmup_steps": 2,
        "train.checkpoint_every": HALF,
        "model.num_experts_per_tok": 4,  # every expert: rounding has no choice to flip
        "model.entropy_model": entropy_model,
        "model.patches": "{mode: entropy, local_size: 32, hash_vocab: 101, threshold: 3.2}",
    }
    return small_recipe(run_dir, **(fixed | more))


@pytest.fixture(scope="module")
def bare(prepared, entropy_model, tmp_path_factory):
    """The curve of a plain loop, and the weights at its end."""
    recipe = recipe_for(tmp_path_factory.mktemp("bare"), entropy_model)
    curve, model = bare_curve(recipe, prepared, STEPS)
    return [loss for loss, _ in curve], model.state_dict()


@pytest.fixture(scope="module")
def runs(prepared, entropy_model, tmp_path_factory):
    """What ``run_all`` says of the runs that stopped (by source), of those that went on (by source and target), and of
    one whose threshold was left open."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [(recipe_for(folder, entropy_model, *source), folder / str(source), HALF) for source in SOURCES]
    null = {"model.patches": "{mode: entropy, local_size: 32, hash_vocab: 101, threshold: null, size: 5}"}
    jobs.append((recipe_for(folder, entropy_model, 2, 2, **null), folder / "open", HALF))
    *results, left_open = run_all(jobs, prepared)
    found = {(source, None): result for source, result in zip(SOURCES, results, strict=True)}
    for world in (1, 2):
        pairs = [pair for pair in PAIRS if pair[1][0] == world]
        jobs = []
        for source, target in pairs:
            again = folder / f"{source} to {target}"
            shutil.copytree(folder / str(source) / "checkpoints", again / "checkpoints")
            jobs.append((recipe_for(folder, entropy_model, *target), again, 10**9))
        found |= dict(zip(pairs, run_all(jobs, prepared), strict=True))
    return folder, found, left_open


@pytest.mark.timeout(600)
def test_every_stage_follows_the_bare_loop_across_a_change_of_topology(runs, bare):
    """In fp32, the second half from a checkpoint of the first: the frozen weights come back as they were."""
    _, found, _ = runs
    for (source, target), (rows, _, settled) in found.items():
        assert settled == {}  # the recipe says it all
        for row in rows:
            assert row["loss"] == pytest.approx(bare[0][row["step"] - 1], rel=1e-5), (source, target, row["step"])
            assert 1.5 < row["bytes_per_patch"] < 20
        first = HALF + 1 if target else 1
        assert [row["step"] for row in rows] == list(range(first, STEPS + 1 if target else HALF + 1))


def test_what_is_saved_holds_the_entropy_model_as_it_was(runs, bare, entropy_model):
    folder, *_ = runs
    trained = load_file(entropy_model / "model.safetensors")
    for name in ("(2, 3) to (1, 1)", "(2, 2) to (1, 3)", "(2, 3) to (2, 3)"):
        (model_folder,) = (folder / name / "checkpoints").glob(f"*{STEPS}/model")
        saved = load_file(model_folder / "model.safetensors")
        for key, tensor in trained.items():
            assert torch.equal(saved[f"model.patches.entropy_model.{key}"], tensor), key
        loaded = AutoModelForCausalLM.from_pretrained(model_folder)
        assert loaded.config.patches.threshold == 3.2
        for key, tensor in loaded.state_dict().items():
            torch.testing.assert_close(tensor, bare[1][key], rtol=1e-3, atol=1e-4)


def test_a_run_says_and_saves_what_its_open_threshold_came_to(runs):
    folder, _, (rows, notes, settled) = runs
    threshold = settled["model.patches.threshold"]
    assert notes == [f"model.patches.threshold={threshold:.6g} gives 5.00 bytes per patch"]
    (saved,) = (folder / "open" / "checkpoints").glob("*/model/config.json")
    assert json.loads(saved.read_text())["patches"]["threshold"] == threshold
    assert [row["bytes_per_patch"] for row in rows] == pytest.approx([5.0] * HALF, rel=0.3)


def test_a_threshold_is_found_on_the_training_text_and_kept(prepared, entropy_model, tmp_path):
    from mmada.data import open_prepared

    null = "{mode: entropy, local_size: 32, hash_vocab: 101, threshold: null, size: 5}"
    recipe = recipe_for(tmp_path, entropy_model, **{"model.patches": null})
    rows = open_prepared(prepared).train.rows(recipe.train.sequence_length)
    model = build_model(recipe)
    (note,) = settle_threshold(model, rows, None)
    settings = model.config.patches
    assert abs(mean_patch_size(settings, *sample_entropies(model, rows)) - 5) < 0.05
    assert note == f"model.patches.threshold={settings.threshold:.6g} gives 5.00 bytes per patch"
    assert settle_threshold(model, rows, None) == []
    (tmp_path / "config.json").write_text(json.dumps({"patches": {"threshold": 1.25}}))
    resumed = build_model(recipe)
    assert settle_threshold(resumed, rows, tmp_path) == [] and resumed.config.patches.threshold == 1.25


def test_frozen_weights_need_no_gradients_and_no_optimizer(entropy_model, tmp_path):
    recipe = recipe_for(tmp_path, entropy_model, zero_stage=0)
    size = model_size(checked_config(recipe))
    frozen = sum(tensor.numel() for tensor in load_file(entropy_model / "model.safetensors").values())
    assert size.frozen == frozen
    memory = stage_memory(recipe, size, 0)
    assert memory.parameters == 4 * size.total
    assert (memory.gradients, memory.optimizer) == (4 * (size.total - frozen), 8 * (size.total - frozen))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model.patches.mode=entropy"], r"model\.entropy_model=null leaves model\.patches\.mode=entropy nothing"),
        (["model.entropy_model=nowhere", "model.patches.mode=entropy"], r"model\.entropy_model=nowhere cannot be used"),
        (["model.entropy_model={folder}"], r"has no part in model\.patches\.mode=space"),
        (
            ["model.entropy_model={folder}", "model.patches.mode=entropy", "model.vocab_size=300"],
            r"patches\.entropy_model\.vocab_size=264 is not vocab_size=300",
        ),
        (["model.patches.local_size=48"], r"model\.patches\.local_size=48 times .* is not hidden_size=128"),
    ],
)
def test_refusals_of_a_recipe(entropy_model, keys, message):
    with pytest.raises(RecipeError, match=message):
        check(load_recipe("bytes", [key.format(folder=entropy_model) for key in keys]))


def test_an_entropy_model_of_words_is_refused(entropy_model, tmp_path):
    from tests.jobs.test_model_building import save_subword_tokenizer

    MMaDAForCausalLM(build_config("debug", num_experts=0)).save_pretrained(tmp_path)
    save_subword_tokenizer(tmp_path)
    keys = [f"model.entropy_model={tmp_path}", "model.patches.mode=entropy"]
    with pytest.raises(RecipeError, match="is no model of bytes; use one with data.tokenizer=bytes"):
        check(load_recipe("bytes", keys))
    with pytest.raises(RecipeError, match=r"data\.tokenizer=.* makes no bytes for model\.patches\.mode=space"):
        check(load_recipe("bytes", [f"data.tokenizer={tmp_path}", "model.vocab_size=300"]))


def test_the_recipe_that_the_shipped_one_names_goes_together(entropy_model):
    keys = ["model.patches.mode=entropy", f"model.entropy_model={entropy_model}"]
    check(load_recipe("bytes", keys))
    assert checked_config(load_recipe("bytes", keys)).patches.entropy_model["hidden_size"] == 32


def test_workers_find_the_folders_that_a_recipe_names_from_here(entropy_model, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "small").symlink_to(entropy_model)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("bytes", ["model.patches.mode=entropy", "model.entropy_model=runs/small"])
    values = recipe_for_workers(recipe)
    monkeypatch.chdir("/")
    assert values["data"]["tokenizer"] == "bytes"
    assert checked_config(Recipe.model_validate(values)).patches.needs_entropy_model
