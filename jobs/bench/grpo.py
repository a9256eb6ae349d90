"""A step of GRPO beside TRL's ``GRPOTrainer``: sample, score, compare within groups, one optimizer step.

Both begin with the same weights, TRL with transformers' Qwen3 and ours with the same as an MMaDA model, and take the
same prompts, settings and reward in one process; after each of TRL's steps comes one of ours. TRL is a dependency of
this bench alone.

# B completions, S tokens of a row (prompt, completion), T completion tokens, D model, V vocabulary
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.bench.measuring import Timings, peer, quartiles, with_spread
from jobs.bench.qwen_twin import twins
from mmada.generate import SamplingSettings, generate_batch
from mmada.tokenizer import BYTE_OFFSET, ByteTokenizer
from mmada.training.algorithms import (
    ALGORITHMS,
    AdvantageSettings,
    Counts,
    LossSettings,
    PolicyBatch,
    ScoredBatch,
)

if TYPE_CHECKING:
    from rich.table import Table

PACKAGE = "trl"
OURS, SAMPLING, LEARNING, TRL = "mmada", "  of it sampling", "  of it learning", "TRL"
LEARNING_RATE, MAX_GRAD_NORM = 1e-5, 1.0
PROMPT = "What is {} plus {}? "


def prompts_of_step(groups: int, step: int) -> list[str]:
    """As many prompts as a step has, others in every step."""
    return [PROMPT.format(group, step % 10) for group in range(groups)]


def reward(completions: Sequence[Sequence[int]]) -> list[float]:
    """The share of even ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


class GRPOStep:
    """One process, no critic, no reference: what a step takes at the least."""

    def __init__(self, model: Any, options: Any) -> None:
        self.model, self.options, self.steps = model, options, 0
        self.tokenizer = ByteTokenizer()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.algorithm, self.settings = ALGORITHMS["grpo"], LossSettings(max_completion_tokens=options.completion)

    def run(self) -> tuple[float, float]:
        """Milliseconds of sampling, and of learning."""
        started = time.perf_counter()
        prompts = [self.tokenizer(text).input_ids for text in prompts_of_step(self.options.groups, self.steps)]
        samples = self.options.samples
        seeds = [
            [(self.steps * len(prompts) + group) * samples + k for k in range(samples)] for group in range(len(prompts))
        ]
        self.model.eval()
        made = generate_batch(
            self.model, prompts, SamplingSettings(self.options.completion), seeds=seeds, slots=len(prompts) * samples
        )
        sampled = time.perf_counter()
        rows = [[*prompt, *each.ids] for prompt, own in zip(prompts, made, strict=True) for each in own]
        completions = [each for own in made for each in own]
        self.learn(rows, [each.ids for each in completions], [each.logprobs for each in completions])
        self.steps += 1
        return 1e3 * (sampled - started), 1e3 * (time.perf_counter() - sampled)

    def learn(self, rows: list[list[int]], completions: list[list[int]], logprobs: list[list[float]]) -> None:
        """One optimizer step. ``rows``: prompt and completion."""
        longest = max(map(len, completions))
        mask_BT = torch.arange(longest) < torch.tensor([len(ids) for ids in completions])[:, None]
        old_BT = torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in logprobs])
        groups_B = torch.arange(len(rows)) // self.options.samples
        scored = ScoredBatch(torch.tensor(reward(completions)), mask_BT, old_BT, groups_B=groups_B)
        advantages_BT = self.algorithm.advantages(scored, AdvantageSettings(), 0.0).advantages_BT
        self.model.train()
        batch = PolicyBatch(self.logprobs(rows, completions), old_BT, advantages_BT, mask_BT)
        self.algorithm.loss(batch, self.settings, Counts.of(mask_BT)).total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def logprobs(self, rows: list[list[int]], completions: list[list[int]]) -> Tensor:
        """Of the completions' tokens, (B, T); rows are padded behind."""
        width, longest = max(map(len, rows)), max(map(len, completions))
        ids_BS = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        begin_B1 = lengths_B1 - torch.tensor([[len(ids)] for ids in completions])
        column_BT = (begin_B1 + torch.arange(longest)).clamp(max=width - 1)
        mask_BS = (torch.arange(width) < lengths_B1).long()
        hidden_BSD = self.model.model(ids_BS, attention_mask=mask_BS, use_cache=False).last_hidden_state
        hidden_BTD = hidden_BSD.gather(1, (column_BT - 1)[..., None].expand(-1, -1, hidden_BSD.shape[2]))
        logprobs_BTV = self.model.lm_head(hidden_BTD).float().log_softmax(dim=-1)
        return logprobs_BTV.gather(2, ids_BS.gather(1, column_BT)[..., None]).squeeze(2)


def measure(options: Any) -> dict[str, Timings]:
    """Both in turns. Raises CommandError where TRL is not installed."""
    trl = peer("trl", PACKAGE)
    tokens = len(ByteTokenizer()(PROMPT).input_ids) + options.completion
    ours, qwen = twins(options.width, options.layers, tokens, eos_token_id=None)
    check_equal(ours, qwen)
    step = GRPOStep(ours, options)
    timings = {name: Timings(name) for name in (OURS, SAMPLING, LEARNING, TRL)}

    def after(milliseconds: float, is_warm: bool) -> None:
        sampling, learning = step.run()
        if is_warm:
            for name, each in (
                (TRL, milliseconds),
                (OURS, sampling + learning),
                (SAMPLING, sampling),
                (LEARNING, learning),
            ):
                timings[name].milliseconds.append(each)

    run_trl(trl, qwen, options, after)
    return timings


def check_equal(ours: Any, theirs: Any) -> None:
    """That both say the same of some tokens."""
    ids = torch.arange(BYTE_OFFSET, BYTE_OFFSET + 16)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def run_trl(trl: Any, model: Any, options: Any, after: Callable[[float, bool], None], warm_ups: int = 2) -> None:
    """Train with TRL; ``after`` every step is called with its milliseconds, and whether it was past the warm-up."""
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after(1e3 * (time.perf_counter() - self.started), state.global_step > warm_ups)

    steps = options.rounds + warm_ups
    texts = [text for step in range(steps) for text in prompts_of_step(options.groups, step)]
    with tempfile.TemporaryDirectory(prefix="mmada-bench-") as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=options.groups * options.samples,
            num_generations=options.samples,
            max_completion_length=options.completion,
            generation_kwargs={"min_new_tokens": options.completion},
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            loss_type="grpo",
            beta=0.0,
            temperature=1.0,
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completion_ids, **kwargs: reward(completion_ids),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=ByteTokenizer(),
            callbacks=[Clock()],
        )
        trainer.train()


def table(timings: dict[str, Timings]) -> Table:
    """What is printed."""
    from jobs.plan_report import table_of

    result = table_of("a step of GRPO", "ms", "times TRL's")
    for name, each in timings.items():
        versus = "" if name == TRL else with_spread(each.ratios(timings[TRL]))
        result.add_row(name, with_spread(quartiles(each.milliseconds)), versus)
    return result


def caption(options: Any, threads: int) -> str:
    """How it was measured."""
    return (
        f"width {options.width}, {options.layers} layers; {options.groups} prompts, {options.samples} completions of "
        f"{options.completion} tokens each, one optimizer step; float32, {threads} threads, {options.rounds} steps of "
        "each in turns; median (quartiles)"
    )


def record(options: Any, timings: dict[str, Timings]) -> dict[str, Any]:
    """The same for a program, with every single step."""
    names = ("width", "layers", "groups", "samples", "completion")
    return {
        "sizes": {name: getattr(options, name) for name in names},
        "milliseconds": {name.strip(): each.milliseconds for name, each in timings.items()},
    }
