"""The plan's arithmetic against hand-worked numbers, the ZeRO paper, and what autograd really keeps."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from jobs.activations import activation_memory
from jobs.plan import (
    Machine,
    ModelSize,
    batch_arithmetic,
    find_machine,
    gib,
    make_plan,
    model_size,
    run,
    stage_memory,
)
from jobs.plan_report import show, way_on
from jobs.prepared_data import cache_dir, find_prepared, text_source
from jobs.recipe import Recipe, load_recipe
from jobs.recipe_checks import checked_config
from jobs.recipe_schema_stages import AdvanceSection
from mmada.data import load_tokenizer, prepare
from mmada.model import MMaDAForCausalLM

LAPTOP = Machine("this machine", cpus=2, gpus=0, memory=16 * 2**30)


def recipe_of(*overrides: str, base: str = "debug") -> Recipe:
    return load_recipe(base, overrides)


def single(*overrides: str) -> Recipe:
    """One worker, all experts."""
    return recipe_of("cluster.workers=1", "cluster.expert_parallel=1", *overrides)


# 1000 parameters, 600 of them in experts, four workers, experts over two: a worker holds 400 + 300 and owns the
# states of 400/4 + 300/2 = 250.
SIZE = ModelSize(total=1000, active=550, experts=600)
FOUR = ("cluster.workers=4", "cluster.expert_parallel=2")


@pytest.mark.parametrize(
    ("precision", "stage", "parameters", "gradients", "optimizer", "buffers"),
    [
        ("fp32", 0, 2800, 2800, 5600, 0),
        ("fp32", 1, 2800, 2800, 3000, 2800),
        ("fp32", 2, 2800, 1000, 3000, 2800),
        ("fp32", 3, 1000, 1000, 3000, 5600),
        ("bf16", 0, 1400, 1400, 8400, 0),
        ("bf16", 1, 1400, 1400, 3000, 1400),
        ("bf16", 2, 1400, 500, 3000, 1400),
        ("bf16", 3, 500, 500, 3000, 2800),
    ],
)
def test_states_of_a_worker_by_hand(
    precision: str, stage: int, parameters: int, gradients: int, optimizer: int, buffers: int
):
    row = stage_memory(recipe_of(*FOUR, f"train.precision={precision}"), SIZE, stage)
    assert (row.parameters, row.gradients, row.optimizer, row.buffers) == (parameters, gradients, optimizer, buffers)
    assert row.states == parameters + gradients + optimizer + buffers


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_are_those_of_the_zero_paper(stage: int, gigabytes: float):
    """Figure 1 of arXiv:1910.02054: 7.5 billion parameters, 64 workers, mixed precision."""
    recipe = recipe_of(
        "cluster.workers=64", "cluster.expert_parallel=1", "train.global_batch=64", "train.precision=bf16"
    )
    row = stage_memory(recipe, ModelSize(7_500_000_000, 7_500_000_000, 0), stage)
    assert (row.parameters + row.gradients + row.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_gpu_gets_whole_buckets():
    """DeepSpeed allocates its bucket in full; without a GPU untouched pages cost nothing."""
    from cluster.engine import REDUCE_BUCKET_SIZE

    row = stage_memory(recipe_of("cluster.gpus_per_worker=1"), SIZE, 2)
    assert row.buffers == 4 * REDUCE_BUCKET_SIZE


def test_activations_by_hand():
    """Width 8, two heads of 4, one key/value head, feed-forward 16, 32 ids, one layer; 2 rows of 4 tokens."""
    recipe = single(
        *("model.hidden_size=8", "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=4"),
        *("model.intermediate_size=16", "model.vocab_size=32", "model.num_hidden_layers=1", "model.num_experts=0"),
        *("train.global_batch=2", "train.sequence_length=4"),
    )
    # block: norms 16·8 + 4·2·8 = 192, attention 4·(2·8 + 2·4) = 96, feed-forward 4·4·16 = 256; head 64 + 32 + 128 = 224
    kept = activation_memory(recipe, checked_config(recipe))
    assert kept.full == 8 * (192 + 96 + 256 + 224)
    assert kept.checkpointed == 8 * (4 * 8 + 192 + 96 + 256 + 224)


def bytes_kept_by_autograd(recipe: Recipe, checkpointing: bool) -> int:
    """Bytes of all tensors saved for the backward pass of one micro batch, parameters left out."""
    attention = recipe.model.attn_implementation
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.precision]
    model = MMaDAForCausalLM._from_config(checked_config(recipe), attn_implementation=attention).to(dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            kept[address] = tensor
        return tensor

    rows, length = recipe.micro_batch, recipe.train.sequence_length
    ids = torch.randint(8, 264, (rows, length))
    positions = torch.arange(length).repeat(rows, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, shift_labels=ids, position_ids=positions, num_items_in_batch=ids.numel(), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.num_experts=0"],
        ["model.attn_implementation=eager"],
        ["train.precision=bf16"],
        ["train.precision=bf16", "model.attn_implementation=eager"],
        ["model.vocab_size=5000"],
        ["train.sequence_length=64", "model.num_experts_per_tok=4"],
        ["model.num_shared_experts=2", "model.hidden_act=gelu_pytorch_tanh"],
        ["model.cross_expert_attention=true"],
        ["model.cross_expert_attention=true", "model.router_normalizer=sparsemax", "train.precision=bf16"],
    ],
    ids=lambda overrides: " ".join(overrides) or "as it is",
)
def test_activations_are_what_autograd_keeps(overrides: list[str]):
    recipe = single("model.preset=tiny", "model.num_experts=8", "train.global_batch=4", *overrides)
    estimate = activation_memory(recipe, checked_config(recipe)).full
    assert estimate == pytest.approx(bytes_kept_by_autograd(recipe, checkpointing=False), rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.mixer_types=ssm,memory_gate", "model.num_hidden_layers=2", "model.num_experts=0"],
        ["model.attn_implementation=blockwise", "model.qk_norm=true"],
        ["model.patches.mode=static", "model.patches.local_size=96"],
    ],
    ids=["state space and memory", "blockwise attention", "byte patches"],
)
def test_activations_of_what_no_formula_knows_are_measured(overrides):
    recipe = single("model.preset=tiny", "train.global_batch=4", *overrides)
    found = activation_memory(recipe, checked_config(recipe))
    assert found.how == "measured on one row"
    assert found.full == pytest.approx(bytes_kept_by_autograd(recipe, checkpointing=False), rel=0.05)
    block = found.checkpointed - bytes_kept_by_autograd(recipe, checkpointing=True)
    assert 0 < block < found.full  # what stays, and one block


def test_checkpointed_activations_are_what_autograd_keeps_and_one_block():
    recipe = single("model.preset=tiny", "model.num_experts=0", "train.global_batch=4")
    config = checked_config(recipe)
    one = activation_memory(recipe, checked_config(single(*_dense_tiny(1)))).full
    two = activation_memory(recipe, checked_config(single(*_dense_tiny(2)))).full
    estimate = activation_memory(recipe, config).checkpointed
    assert estimate - (two - one) == pytest.approx(bytes_kept_by_autograd(recipe, checkpointing=True), rel=0.05)


def _dense_tiny(layers: int) -> tuple[str, ...]:
    return ("model.preset=tiny", "model.num_experts=0", f"model.num_hidden_layers={layers}")


def test_batch_arithmetic():
    recipe = recipe_of("train.global_batch=24", "train.micro_batch=3", "train.sequence_length=128", "train.steps=10")
    batch = batch_arithmetic(recipe, train_tokens=15_360)
    assert (batch.global_batch, batch.workers, batch.micro_batch, batch.accumulation) == (24, 2, 3, 4)
    assert (batch.tokens_per_step, batch.tokens_in_run, batch.epochs) == (3072, 30_720, 2.0)
    assert batch_arithmetic(recipe, train_tokens=None).epochs is None


def test_model_size_counts_experts_and_what_a_token_uses():
    """debug: width 64, one layer of 4 experts of width 64, of which a token uses 2."""
    recipe = recipe_of()
    size = model_size(checked_config(recipe))
    per_expert = 3 * 64 * 64
    assert size.experts == 4 * per_expert
    assert size.total - size.active == 2 * per_expert
    model = MMaDAForCausalLM(checked_config(recipe))
    assert size.total == sum(parameter.numel() for parameter in model.parameters())


def plan_of(*overrides: str, machine: Machine = LAPTOP, base: str = "debug"):
    recipe = recipe_of(*overrides, base=base)
    config = checked_config(recipe)
    return make_plan(recipe, config, model_size(config), machine, None)


@pytest.mark.parametrize(
    ("overrides", "machine", "words"),
    [
        (["train.precision=bf16"], LAPTOP, "train.precision=bf16 without a GPU"),
        (["train.offload_optimizer=true"], LAPTOP, "moves nothing"),
        ([], replace(LAPTOP, gpus=1), "1 GPU(s) stay idle"),
        (["cluster.workers=4"], LAPTOP, "want 4 CPUs and there are 2"),
        ([], replace(LAPTOP, memory=2**20), "a worker needs"),
        (["train.zero_stage=3"], LAPTOP, "gathers every layer anew"),
    ],
)
def test_doubts(overrides: list[str], machine: Machine, words: str):
    assert [line for line in plan_of(*overrides, machine=machine).warnings if words in line]
    assert not [line for line in plan_of().warnings if words in line]


def test_offloaded_states_leave_the_gpu_and_not_the_cpu():
    on_gpu = replace(LAPTOP, gpus=2, gpu_memory=80 * 2**30)
    plan = plan_of("cluster.gpus_per_worker=1", machine=on_gpu)
    offloaded = plan_of("cluster.gpus_per_worker=1", "train.offload_optimizer=true", machine=on_gpu)
    assert plan.worker_bytes - offloaded.worker_bytes == plan.stages[2].optimizer
    assert (plan.room_per_worker, plan_of().room_per_worker) == (80 * 2**30, 8 * 2**30)
    assert plan_of("train.offload_optimizer=true").worker_bytes == plan_of().worker_bytes


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "ZeRO 2: optimizer states and gradients split over 2 workers"),
        ([], "AutoEP: 2 of 4 experts on each worker, 1 copy of each"),
        (["cluster.workers=8"], "AutoEP: 2 of 4 experts on each worker, 4 copies of each"),
        (["cluster.expert_parallel=1"], "all 4 experts on every worker"),
        (["train.schedule=constant"], "learning rate 0.003 after 5 steps of warm-up, then constant"),
        (["train.precision=bf16"], "bf16 weights and gradients, a 32-bit copy of the weights in the optimizer"),
        (["train.clip_grad_norm=0"], "AdamW, weight decay 0.1; gradients not clipped"),
        (["train.gradient_checkpointing=true"], "blocks computed anew in the backward pass"),
        (["train.offload_optimizer=true"], "optimizer states in the host's memory"),
    ],
)
def test_engine_in_words(overrides: list[str], line: str):
    assert line in plan_of(*overrides).engine


@pytest.mark.parametrize(
    ("overrides", "base"),
    [
        ([], "quickstart"),
        (["train.offload_optimizer=true", "train.gradient_checkpointing=true"], "debug"),
        (["model.preset=12b", "model.num_experts=64", "cluster.workers=64", "train.global_batch=4096"], "debug"),
    ],
)
def test_the_report_fits_100_columns(overrides: list[str], base: str):
    out = io.StringIO()
    show(plan_of(*overrides, base=base), Console(file=out))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    assert "…" not in out.getvalue(), "a cell was cut"
    assert [line.split()[:2] for line in lines if "(this recipe)" in line] == [["ZeRO", "2"]]
    assert [line.split()[:2] for line in lines if "(refused)" in line] == [["ZeRO", "0"]]


def test_stages_are_shown_with_what_ends_them():
    out = io.StringIO()
    show(plan_of(base="stages"), Console(file=out))
    lines = [line.split() for line in out.getvalue().splitlines()]
    (first,) = [number for number, line in enumerate(lines) if line[:3] == ["stages", "steps", "batch"]]
    assert [" ".join(line) for line in lines[first + 2 : first + 6]] == [
        "text 60 32 x 128 text 100% never nothing",
        "sums 120 32 x 128 text 25%, sums 75% held_out_bits no better in 3 nothing",
        "evaluations running",
        "both 60 32 x 128 text 50%, sums 50% never embeddings",
    ]
    assert "at most 240 steps" in out.getvalue() and "at most 983,040 tokens in the run" in out.getvalue()
    assert "not prepared" not in out.getvalue() and "…" not in out.getvalue()
    assert max(len(line) for line in out.getvalue().splitlines()) <= 100
    out = io.StringIO()
    show(plan_of(), Console(file=out))
    assert "frozen" not in out.getvalue() and "at most" not in out.getvalue()


@pytest.mark.parametrize(
    ("advance", "words"),
    [
        ({"when": "threshold", "metric": "held_out_accuracy", "threshold": 0.8}, ">= 0.8 in 2 evaluations running"),
        ({"when": "threshold", "metric": "held_out_bits", "threshold": 2.5, "times": 1}, "<= 2.5 in 1 evaluation"),
        ({"when": "plateau", "metric": "held_out_bits"}, "no better in 2 evaluations running"),
    ],
)
def test_what_ends_a_stage_in_words(advance: dict, words: str):
    assert way_on(AdvanceSection(**advance)).removeprefix(advance["metric"]).strip().startswith(words)


def test_sizes_in_words():
    assert [gib(count) for count in (0, 1023, 1536, 5 * 2**20, 3 * 2**40)] == [
        *("0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3072.0 GiB")
    ]


def test_this_machine():
    machine = find_machine(recipe_of())
    assert machine.cpus == os.cpu_count() and machine.gpus == torch.cuda.device_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory == pytest.approx(pages, rel=0.01)


def test_a_cluster_is_asked_what_it_has():
    program = (
        "import sys, ray\n"
        "context = ray.init(address='local', num_cpus=3, include_dashboard=False, logging_level='ERROR')\n"
        "print(context.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as head:
        try:
            address = head.stdout.readline().strip()
            machine = find_machine(recipe_of(f"cluster.address={address}"))
        finally:
            head.stdin.close()
            head.wait(timeout=60)
    assert (machine.cpus, machine.gpus) == (3, 0)
    assert machine.where == f"Ray at {address}, 1 node(s)" and machine.memory > 2**30


def test_prepared_text_is_found_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(20):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number} " * 20)
    recipe = recipe_of("data.source=files", f"data.path={tmp_path / 'texts'}", f"run.dir={tmp_path / 'runs'}")
    assert find_prepared(recipe) is None and not (tmp_path / "runs").exists()
    prepared = prepare(text_source(recipe), load_tokenizer("bytes"), cache_dir(recipe), held_out=recipe.data.held_out)
    found = find_prepared(recipe)
    assert found is not None and found.fingerprint == prepared.fingerprint
    other = load_recipe(
        "debug",
        ["data.source=files", f"data.path={tmp_path / 'texts'}", f"run.dir={tmp_path / 'runs'}", "data.held_out=0.2"],
    )
    assert find_prepared(other) is None
    assert run(recipe) == 0
    assert f"{20_480 / prepared.train.num_tokens:.2f} times through the text" in capsys.readouterr().out


def test_a_used_name_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "debug" / "checkpoints").mkdir(parents=True)
    assert run(recipe_of(f"run.dir={tmp_path}")) == 0
    assert "mmada train would refuse: run.name=debug has been used already" in " ".join(capsys.readouterr().out.split())


def test_a_kernel_for_gpus_is_measured_by_one_that_keeps_as_much():
    config = checked_config(single())
    kernels = ("flex_attention", "blockwise")
    flex, blockwise = (activation_memory(single(f"model.attn_implementation={name}"), config) for name in kernels)
    assert flex == blockwise
