"""``mmada profile``: the parts add up to the model, each switch leaves one thing out, and MLflow gets all of it."""

import json
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.bench.counting import count_flops
from jobs.profiling.parts import Part, take_apart
from jobs.profiling.run import FULL, contender_of, counted, measure_in_pairs, part_contender, settle_threshold
from jobs.profiling.switches import SWITCHES, all_off, config_without, setting, switches_in_use
from mmada.model import MMaDAForCausalLM
from mmada.nn.mixers.registry import MIXERS
from mmada.presets import build_config

ROWS, LENGTH = 2, 48
TOKENS = ROWS * LENGTH


def make_model(**overrides) -> MMaDAForCausalLM:
    torch.manual_seed(0)
    config = build_config("debug", **overrides)
    return MMaDAForCausalLM._from_config(config, attn_implementation="sdpa").train()


def make_batch() -> dict:
    ids = torch.randint(8, 264, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.roll(-1, dims=1)
    return {"input_ids": ids, "shift_labels": labels, "sample_ids": torch.arange(ROWS), "use_cache": False}


def flops_of(part: Part) -> int:
    """Of both passes."""
    forward, outputs = count_flops(lambda: part.forward(part.inputs()))
    backward, _ = count_flops(lambda: torch.autograd.backward(outputs, [torch.randn_like(each) for each in outputs]))
    return forward + backward


def everything() -> MMaDAForCausalLM:
    """Every kind of layer that there is, the first attention in a dense block, all others with experts; in patches."""
    kinds = ["attention", *MIXERS]
    return make_model(
        num_hidden_layers=len(kinds),
        mixer_types=kinds,
        num_key_value_heads=4,
        sliding_window=16,
        window_sizes=[8, -1],
        sparse_block_size=8,
        ssm={"chunk_size": 8},
        hybrid={"memory_slots": 4},
        memory={"num_heads": 2, "head_dim": 8, "chunk_size": 8, "segment_size": 16},
        patches={"mode": "static", "size": 2, "local_size": 32},
        mlp_layer_types=["dense"] + ["moe"] * (len(kinds) - 1),
        num_shared_experts=1,
        cross_expert_attention=True,
        cross_expert_heads=4,
        embedding_dropout=0.1,
    )


def test_the_parts_add_up_to_the_model():
    model, batch = everything(), make_batch()
    parts = {part.name: part for part in take_apart(model, batch)}
    mixers = [f"mixer: {kind}" for kind in MIXERS]
    assert [*parts] == [
        "embeddings", "byte encoder", "patch pooling", "byte decoder", "input noise", "norms", *mixers,
        "feed-forward: dense", "feed-forward: experts", "router", "shared experts", "cross-expert attention", "head",
        "loss",
    ]  # fmt: skip
    blocks = model.config.num_hidden_layers
    layers = {"norms": 2 * blocks, "router": blocks - 1, "mixer: attention": 2, "byte decoder": 1}
    assert {name: len(parts[name].calls) for name in layers} == layers
    found = {key for part in parts.values() for key in part.parameters()}
    assert found == {id(parameter) for parameter in model.parameters()}
    whole, loss = count_flops(lambda: model(**batch).loss)
    whole += count_flops(loss.backward)[0]
    assert sum(map(flops_of, parts.values())) == whole


def test_operations_are_those_of_the_formulas():
    model = make_model()
    config, parts = model.config, {part.name: part for part in take_apart(model, make_batch())}
    width, chosen = config.hidden_size, config.num_experts_per_tok
    per_weight = 6 * TOKENS  # one product forward and two backward, two operations each
    assert flops_of(parts["feed-forward: dense"]) == per_weight * 3 * width * config.intermediate_size
    assert flops_of(parts["feed-forward: experts"]) == per_weight * chosen * 3 * width * config.moe_intermediate_size
    assert flops_of(parts["head"]) == per_weight * width * config.vocab_size
    assert flops_of(parts["norms"]) == 0
    projections = 2 * (1 + config.num_key_value_heads / config.num_attention_heads) * width**2
    scores = (2 + 5) * 2 * ROWS * LENGTH**2 * width  # two products forward and five backward
    assert flops_of(parts["mixer: attention"]) == 2 * (per_weight * projections + scores)


def test_a_part_alone_computes_what_it_does_in_the_model():
    """With the router's noise, which a router that is called in another way would leave out."""
    model, batch = make_model(mlp_layer_types=["moe", "moe"]), make_batch()
    for block in model.model.layers:
        torch.nn.init.normal_(block.router_tap.noise_weight)
    output = model(**batch)
    parts = {part.name: part for part in take_apart(model, batch)}
    (logits,) = parts["head"].forward(parts["head"].inputs())
    (loss,) = parts["loss"].forward(parts["loss"].inputs())
    routed = parts["router"].forward(parts["router"].inputs())
    assert torch.equal(logits, output.logits) and torch.equal(loss, output.lm_loss)
    assert all(map(torch.equal, routed[::2], output.router_logits))
    assert not torch.equal(routed[0], model.eval()(**batch).router_logits[0])


def test_a_part_leaves_no_gradient_in_the_model_and_can_be_run_again():
    model = make_model()
    (part,) = (each for each in take_apart(model, make_batch()) if each.name == "mixer: attention")
    first, second = part.forward(part.inputs()), part.forward(part.inputs())
    assert all(map(torch.equal, first, second))
    torch.autograd.backward(first, [torch.ones_like(each) for each in first])
    own = part.parameters()
    assert all((parameter.grad is not None) == (id(parameter) in own) for parameter in model.parameters())


def test_a_model_that_only_cuts_patches_is_not_run_backward():
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    patches = {"mode": "entropy", "size": 3, "threshold": None, "entropy_model": small, "local_size": 32}
    model, batch = make_model(patches=patches), make_batch()
    settle_threshold(model, batch["input_ids"])
    assert TOKENS / int(model(**batch).num_patches.sum()) == pytest.approx(3, rel=0.1)
    (part,) = (part for part in take_apart(model, batch) if part.name == "entropy model")
    cost = counted(part_contender((part, 5)), passes=[])
    assert cost.flops[0] > 0 and cost.flops[1] == 0 and cost.kept == (0, 0) and cost.parameters == 5


def test_every_switch_leaves_one_thing_out():
    kinds = ["attention", "window", "ssm", "hybrid", "memory"]
    config = build_config(
        "debug", num_hidden_layers=5, mixer_types=kinds, mlp_layer_types=["dense"] + ["moe"] * 4, qk_norm=True,
        num_shared_experts=1, cross_expert_attention=True, cross_expert_heads=4, router_bias_update_rate=1e-3,
        router_normalizer="sparsemax", attention_normalizer="sparsemax", attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, attention_dropout=0.1, embedding_dropout=0.1, position_embedding_type="alibi",
        patches={"mode": "static", "local_size": 32}, memory={"gate": "hard"},
    )  # fmt: skip
    switches = switches_in_use(config)
    assert [switch.name for switch in switches][:4] == [f"{kind} layers (attention)" for kind in kinds[1:]]
    assert switches[4:] == list(SWITCHES)
    fields = ["mixer_types", *(name for switch in SWITCHES for name in switch.off)]
    for switch in switches:
        without = config_without(config, switch)
        changed = {name for name in fields if setting(without, name) != setting(config, name)}
        assert changed and changed <= {*switch.off}
        assert not switch.is_on(without)
    plain = config_without(config, all_off(config))
    assert switches_in_use(plain) == []
    assert set(plain.mixer_types) == {"attention"} and set(plain.mlp_layer_types) == {"dense"}


def test_what_is_not_there_is_not_switched_off():
    names = [switch.name for switch in switches_in_use(build_config("debug", num_experts=0, qk_norm=True))]
    assert names == ["query and key norms"]  # the router's noise is on, but there is no router


def test_a_profile_is_printed_written_and_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    small = ["train.global_batch=2", "cluster.workers=1", "cluster.expert_parallel=1", "train.sequence_length=16"]
    where = [f"run.dir={tmp_path}", "tracking.experiment=costs", "cluster.threads_per_worker=1"]
    file = tmp_path / "profile.json"
    with pytest.raises(SystemExit) as exited:
        cli.main(["profile", "debug", *small, "--rounds", "2", "--json", str(file), *where])
    out, err = capfd.readouterr()
    assert (exited.value.code, err) == (0, "")
    written = json.loads(file.read_text())
    names = [row["name"] for row in [*written["parts"], *written["models"]]]
    assert names[-4:] == [FULL, "experts (dense)", "router noise", "all of these"]
    assert all(f" {name} " in out for name in names) and "2 rows of 16 random bytes" in out
    assert all(len(row["passes"]) == 2 for row in [*written["parts"], *written["models"][1:]])
    assert all(len(row["beside"]) == 2 for row in written["models"][1:])

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("costs").experiment_id])
    assert (run.info.run_name, run.info.status) == ("debug-profile", "FINISHED")
    full = written["models"][0]
    assert run.data.metrics["without/nothing_the_full_model/flops"] == sum(full["flops"])
    assert run.data.metrics["part/mixer_attention/parameters"] == 24_576
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"profile.txt", "profile.json"}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/profile.png"]
    assert not (tmp_path / "debug").exists()  # no run folder is made, and none is asked for


def test_models_are_timed_beside_the_full_one():
    batch = make_batch()
    full, smaller = (contender_of(str(experts), make_model(num_experts=experts), batch) for experts in (4, 0))
    (alone,) = measure_in_pairs(full, [], rounds=2)  # a model of which nothing can be switched off
    assert (alone.name, len(alone.passes), alone.beside) == ("4", 2, [])
    both = measure_in_pairs(full, [smaller, full], rounds=2)
    assert [len(cost.passes) for cost in both] == [4, 2, 2]
    assert sorted(both[1].beside + both[2].beside) == sorted(both[0].passes)
    assert all(parameter.grad is None for parameter in [*full.used, *smaller.used])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["debug", "--rounds", "1"], ["--rounds: 1", "use 2 or more"]),
        (["debug", "--json", "/nowhere/p.json"], ["/nowhere/p.json", "make /nowhere first"]),
        (["debug", "train.micro_batch=3"], ["train.micro_batch=3", "use 1, 2 or 4"]),
        (["debug", "--rounds", "2", "train.stesp=3"], ["train.stesp=3", "did you mean train.steps?"]),
        (["debug", "--fast", "train.steps=3"], ["argument=--fast", "see mmada profile --help"]),
        (["debug", "run.dir=/dev/null/runs"], ["run.dir=/dev/null/runs", "give another folder"]),
        (["debug", "tracking.uri=ftp://x"], ["tracking.uri=ftp://x", "use http://host:port"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_profiled_is_refused_in_one_line(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        cli.main(["profile", *arguments])
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in words), err
    assert list(tmp_path.iterdir()) == []
