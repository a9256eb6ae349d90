"""How many held-out problems a policy solves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from jobs.studies.intervals import Estimate, bootstrap, wilson
from mmada.data.task_rows import prompt_ids
from mmada.data.tasks import TaskItem, TaskSet
from mmada.generate import Completion, SamplingSettings, generate_batch


@dataclass(frozen=True)
class Answer:
    """What was answered to one problem, once per sample: texts, scores in [0, 1], whether each ended by itself."""

    item: TaskItem
    texts: list[str]
    scores: list[float]
    ended: list[bool]
    refusals: list[str] = field(default_factory=list)  # what the scorer raised on a text, which then scores 0

    @property
    def accuracy(self) -> float:
        """Share of the samples with full marks."""
        return fmean(score >= 1 for score in self.scores)


@dataclass(frozen=True)
class EvaluationResult:
    """All answers. Problems are the independent values of every interval; samples of one problem are not."""

    answers: list[Answer]
    seconds: float
    new_tokens: int

    @property
    def accuracy(self) -> Estimate:
        """Share of answers with full marks: Wilson's interval of one sample each, the bootstrap's of several."""
        return accuracy_of(self.answers)

    @property
    def score(self) -> Estimate:
        """Mean score, which partial marks count in."""
        return score_of(self.answers)

    @property
    def families(self) -> dict[str, list[Answer]]:
        """The answers by family."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.item.family, []).append(answer)
        return found


def accuracy_of(answers: Sequence[Answer]) -> Estimate:
    """Share of full marks."""
    shares = [answer.accuracy for answer in answers]
    if all(len(answer.scores) == 1 for answer in answers):
        return wilson(round(sum(shares)), len(shares))
    return bootstrap(shares)


def score_of(answers: Sequence[Answer]) -> Estimate:
    """Mean score over problems."""
    return bootstrap([fmean(answer.scores) for answer in answers])


def held_out_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task_set: TaskSet,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    slots: int = 32,
    items: Iterable[TaskItem] | None = None,
) -> EvaluationResult:
    """Let a policy in evaluation mode answer the held-out problems (or ``items``) and score it.

    Greedy at ``temperature`` 0. The noise of sample k of problem i is a function of (seed, i, k). Raises ValueError
    for a prompt that leaves ``max_new_tokens`` no room in the model's positions.
    """
    chosen = list(task_set.held_out if items is None else items)
    started = time.perf_counter()
    completions = generate_batch(
        model,
        [prompt_ids(tokenizer, item.prompt) for item in chosen],
        SamplingSettings(max_new_tokens, temperature),
        seeds=[[(seed << 32) + item.index * samples + k for k in range(samples)] for item in chosen],
        slots=slots,
        tokenizer=tokenizer,
    )
    seconds = time.perf_counter() - started
    answers = [scored(task_set, tokenizer, item, own) for item, own in zip(chosen, completions, strict=True)]
    return EvaluationResult(answers, seconds, sum(len(each.ids) for own in completions for each in own))


def scored(
    task_set: TaskSet, tokenizer: PreTrainedTokenizerBase, item: TaskItem, completions: Sequence[Completion]
) -> Answer:
    """One problem's completions as text, with their scores. A text that the scorer cannot take scores 0."""
    answer = Answer(item, [], [], [])
    for completion in completions:
        text = tokenizer.decode(completion.ids, skip_special_tokens=True)
        try:
            score = task_set.score(item, text)
        except Exception as error:  # scorers of reasoning-gym raise all kinds of things on what is no answer
            answer.refusals.append(f"{type(error).__name__}: {error}")
            score = 0.0
        answer.texts.append(text)
        answer.scores.append(score)
        answer.ended.append(completion.finish == "end")
    return answer
