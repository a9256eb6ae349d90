"""What cannot be improved by reinforcement learning is refused before anything starts, in one line with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ClusterError
from jobs.model_building import model_config
from jobs.recipe import RecipeError, load_recipe, shipped_recipes
from jobs.recipe_checks_ppo import check_ppo, completed
from mmada.errors import DataError
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import MMaDARewardModel
from mmada.tokenizer import ByteTokenizer

REFUSED = [
    (["ppo.minibatch=17"], ["ppo.minibatch=17", "16 trajectories", "use at most 16"]),
    (["ppo.minibatch=7"], ["ppo.minibatch=7", "cluster.workers=2", "use 8"]),
    (["ppo.micro_batch=3"], ["ppo.micro_batch=3", "the 4 trajectories of a worker", "use 1, 2 or 4"]),
    (
        ["ppo.algorithm=grpo", "ppo.samples_per_prompt=1", "ppo.minibatch=8"],
        ["ppo.samples_per_prompt=1", "use 2 or more"],
    ),
    (["ppo.algorithm=reinforce", "ppo.epochs=2"], ["ppo.epochs=2", "takes one step"]),
    (
        ["ppo.algorithm=reinforce", "ppo.epochs=1", "ppo.max_staleness=1"],
        ["ppo.max_staleness=1", "use ppo.max_staleness=0"],
    ),
    (["ppo.kl_target=6", "ppo.kl_coefficient=0"], ["ppo.kl_target=6", "above 0"]),
    (["ppo.kl_target=6", "ppo.algorithm=grpo"], ["ppo.kl_target=6", "ppo.algorithm=grpo", "leave it out"]),
    (["ppo.max_new_tokens=1020"], ["ppo.max_new_tokens=1020", "model.max_position_embeddings=1024"]),
    (["tasks.family=chain_sums"], ["chain_sums", "chain_sum"]),
    (["tasks.config={min_termz: 2}"], ["tasks.config.min_termz"]),
    (["reward.parts=[{kind: task, name: x}]"], ["reward.parts[0].name=x", "remove it"]),
    (["reward.parts=[{kind: function}]"], ["reward.parts[0].name is missing", "module:function"]),
    (['reward.parts=[{kind: function, name: "nowhere:f"}]'], ["nowhere", "cannot be imported"]),
    (['reward.parts=[{kind: http, name: "example"}]'], ["example", "no URL"]),
    (['reward.parts=[{kind: http, name: "http://[::1/x"}]'], ["no URL"]),
    (['reward.parts=[{kind: http, name: "http://localhost:99999/x"}]'], ["99999", "no URL"]),
    (["reward.parts=[{kind: model, name: nowhere}]"], ["reward.parts[0].name=nowhere", "not a folder"]),
    (["ppo.start_from=nowhere"], ["ppo.start_from=nowhere", "not a folder"]),
    (["data.source=files", "data.path=texts"], ["data.source=files", "no part in `mmada ppo`"]),
    (["train.objective=reward"], ["train.objective=reward", "no part in `mmada ppo`"]),
    (["ppo.iterations=2", "ppo.warmup_iterations=3"], ["ppo.warmup_iterations=3", "ppo.iterations=2"]),
    (["model.num_experts=3"], ["model.num_experts=3", "cluster.expert_parallel=2"]),
    (["train.zero_stage=0"], ["train.zero_stage=0", "cluster.expert_parallel"]),
    (["cluster.gpus_per_worker=1", "cluster.workers=64", "ppo.minibatch=64", "ppo.prompts_per_iteration=64"], ["GPU"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[" ".join(each[0]) for each in REFUSED])
def test_what_does_not_go_together_is_refused(overrides: list[str], words: list[str]):
    with pytest.raises((RecipeError, DataError, ClusterError)) as refused:
        check_ppo(completed(load_recipe("ppo-debug", overrides)))
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_recipe_for_training_alone_is_refused():
    with pytest.raises(RecipeError, match="ppo.iterations is missing"):
        completed(load_recipe("debug"))
    with pytest.raises(RecipeError, match="tasks.family is missing"):
        completed(load_recipe("debug", ["ppo.iterations=1"]))


def test_without_a_reward_the_task_is_the_reward():
    recipe = completed(load_recipe("debug", ["ppo.iterations=1", "tasks.family=chain_sum"]))
    assert recipe.reward is not None and [part.kind for part in recipe.reward.parts] == ["task"]


def test_the_policy_to_start_from_has_the_recipes_architecture(tmp_path: Path):
    saved = tmp_path / "policy"
    MMaDAForCausalLM(model_config(load_recipe("ppo-debug"))).save_pretrained(saved)
    ByteTokenizer().save_pretrained(saved)
    check_ppo(completed(load_recipe("ppo-debug", [f"ppo.start_from={saved}"])))
    with pytest.raises(RecipeError, match=r"model.intermediate_size=96 is not what ppo.start_from=.* has \(128\)"):
        check_ppo(completed(load_recipe("ppo-debug", [f"ppo.start_from={saved}", "model.intermediate_size=96"])))


def test_a_resumed_run_needs_its_start_no_more(tmp_path: Path):
    keys = ["ppo.start_from=gone", "run.resume=true", f"run.dir={tmp_path}", "run.name=run"]
    with pytest.raises(RecipeError, match="ppo.start_from=gone is not a folder"):
        check_ppo(completed(load_recipe("ppo-debug", keys)))
    (tmp_path / "run" / "reference").mkdir(parents=True)
    check_ppo(completed(load_recipe("ppo-debug", keys)))


def test_language_and_reward_models_do_not_take_each_others_place(tmp_path: Path):
    config = model_config(load_recipe("ppo-debug"))
    for name, kind in (("language", MMaDAForCausalLM), ("reward", MMaDARewardModel)):
        kind(config).save_pretrained(tmp_path / name)
        ByteTokenizer().save_pretrained(tmp_path / name)
    check_ppo(completed(load_recipe("ppo-debug", [f"reward.parts=[{{kind: model, name: {tmp_path}/reward}}]"])))
    with pytest.raises(RecipeError, match=r"reward.parts\[0\].name=.*language holds no reward model"):
        check_ppo(completed(load_recipe("ppo-debug", [f"reward.parts=[{{kind: model, name: {tmp_path}/language}}]"])))
    with pytest.raises(RecipeError, match=r"ppo.start_from=.*reward holds a reward model; give a language model"):
        check_ppo(completed(load_recipe("ppo-debug", [f"ppo.start_from={tmp_path}/reward"])))


def test_damaged_weights_to_start_from_are_refused(tmp_path: Path):
    MMaDAForCausalLM(model_config(load_recipe("ppo-debug"))).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RecipeError, match=r"ppo.start_from=.* has damaged weights in model.safetensors"):
        check_ppo(completed(load_recipe("ppo-debug", [f"ppo.start_from={tmp_path}"])))


def test_every_shipped_recipe_with_a_policy_can_be_run():
    names = [name for name in shipped_recipes() if load_recipe(name).ppo is not None]
    assert {"ppo", "ppo-debug"} <= set(names)
    for name in names:
        check_ppo(completed(load_recipe(name)))
