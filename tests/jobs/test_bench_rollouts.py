"""``mmada bench rollouts``: equal twins, tokens counted alike, a step that learns, and what is said without TRL."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from jobs.bench import generation, grpo, rollouts
from jobs.bench.qwen_twin import twins
from jobs.cli import CommandError


@pytest.fixture(scope="module")
def quick():
    return rollouts.parse(["--quick"])


def test_the_twins_say_the_same():
    ours, theirs = twins(64, 2, max_position_embeddings=32, eos_token_id=None)
    ids = torch.randint(264, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    names = dict(ours.named_parameters())
    assert {name.replace(".self_attn.", ".mixer.") for name, _ in theirs.named_parameters()} == set(names)


def test_transformers_tokens_are_counted_up_to_the_end():
    _, qwen = twins(32, 1, max_position_embeddings=32, eos_token_id=None)
    prompts = generation.random_prompts(5, 3, 9)
    assert all(3 <= len(prompt) <= 9 for prompt in prompts)
    assert generation.count_generated(qwen, prompts, 7, [263]) <= 5 * 7
    assert generation.count_generated(qwen, prompts, 7, range(264)) == 5
    every_other = generation.count_generated(qwen, prompts, 30 - 9, range(0, 264, 2))
    assert 5 <= every_other < 5 * 10  # two tokens each, on average


def test_ratios_are_of_tokens_per_second_within_a_round():
    taken = {generation.OURS: [(10, 1.0), (20, 4.0)], generation.QWEN: [(8, 2.0), (50, 5.0)]}
    assert generation.ratios(taken, generation.QWEN) == [2.5, 0.5]


def test_a_step_of_ours_takes_to_what_was_rewarded(quick):
    ours, _ = twins(32, 1, max_position_embeddings=64, eos_token_id=None)
    quick = SimpleNamespace(**{**vars(quick), "samples": 4, "groups": 2})
    step = grpo.GRPOStep(ours, quick)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    rows = [[1, 50, 51 + index, *range(60 + 5 * index, 64 + 5 * index - index % 2)] for index in range(8)]
    completions = [row[3:] for row in rows]

    def logprobs():
        with torch.no_grad():
            return step.logprobs(rows, completions)

    before = logprobs()
    for row, completion, own in zip(rows, completions, before, strict=True):
        told = ours(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = told[torch.arange(2, len(row) - 1), torch.tensor(completion)]
        assert_close(own[: len(completion)], expected.detach(), rtol=1e-5, atol=1e-6)
    step.learn(rows, completions, [own[: len(ids)].tolist() for own, ids in zip(before, completions, strict=True)])
    worth = torch.tensor(grpo.reward(completions))
    gained = (logprobs() - before)[:, :3].mean(dim=1)
    for group in (slice(0, 4), slice(4, 8)):
        assert torch.corrcoef(torch.stack([worth[group], gained[group]]))[0, 1] > 0.5


def test_a_missing_trl_is_named_with_the_remedy_and_stops_no_other_part(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)  # what makes an import fail
    with pytest.raises(CommandError, match="package=trl .* pip install trl"):
        rollouts.measure_parts(["grpo"], quick, threads=1)
    printed, figures = rollouts.measure_parts(["grpo", "generation"], quick, threads=1)
    assert figures["grpo"] is None and "pip install trl" in printed[0]
    assert set(figures["generation"]["runs"]) == {
        generation.OURS, generation.AT_ONCE, generation.IN_GROUPS, generation.QWEN,
    }  # fmt: skip


def test_trl_is_asked_for_the_same_and_ours_comes_after_each_of_its_steps(quick, monkeypatch, tmp_path, capfd):
    asked = {}

    class GRPOTrainer:
        def __init__(self, model, reward_funcs, args, train_dataset, processing_class, callbacks):
            asked.update(vars(args), reward=reward_funcs, prompts=train_dataset["prompt"], model=model)
            self.steps, self.callbacks = args.max_steps, callbacks

        def train(self):
            for step in range(self.steps):
                for callback in self.callbacks:
                    callback.on_step_begin(None, None, None)
                    callback.on_step_end(None, SimpleNamespace(global_step=step + 1), None)

    trl = SimpleNamespace(GRPOConfig=SimpleNamespace, GRPOTrainer=GRPOTrainer)
    monkeypatch.setitem(sys.modules, "trl", trl)
    arguments = ["--part", "grpo", "--quick", "--threads", "1", "--json", str(tmp_path / "all.json")]
    assert rollouts.run(arguments) == 0
    assert asked["per_device_train_batch_size"] == quick.groups * quick.samples
    assert asked["generation_kwargs"] == {"min_new_tokens": quick.completion}  # as ours, which has no end token
    assert asked["max_completion_length"] == quick.completion and asked["num_generations"] == quick.samples
    assert len(asked["prompts"]) == (quick.rounds + 2) * quick.groups
    assert asked["reward"](completion_ids=[[2, 3], [4, 6]]) == [0.5, 1.0]
    taken = json.loads((tmp_path / "all.json").read_text())["grpo"]["milliseconds"]
    assert {name: len(each) for name, each in taken.items()} == dict.fromkeys(
        ("mmada", "of it sampling", "of it learning", "TRL"), quick.rounds
    )
    out, err = capfd.readouterr()
    assert err == "" and "a step of GRPO" in out and "2 prompts, 2 completions of 4 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "all-of-it"], "--part"),
        (["--lengths", "96,16"], r"--lengths=\[96, 16\] is no shortest and longest"),
        (["--lengths", "5"], "is no shortest and longest"),
        (["--width", "48"], "--width=48 is not made of heads of 32"),
        (["--end-ids", "256"], "--end-ids=256 leaves no id"),
        (["--rounds", "1"], "use 2 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(CommandError, match=message):
        rollouts.parse(arguments)
