"""Problems and completions as rows of tokens: ``[begin] prompt | answer [end] | padding``.

Prompts become tokens here and nowhere else, so that what is learned from, sampled from and scored is the same.

# B rows of a batch, T tokens of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmada.data.packing import IGNORE_INDEX
from mmada.errors import DataError

if TYPE_CHECKING:
    from mmada.data.tasks import TaskItem


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's tokens with whatever the tokenizer puts in front, and without an end of text behind it."""
    ids = list(tokenizer(prompt)["input_ids"])
    plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """An answer's tokens and the end of text. Raises DataError for a tokenizer that has no such token."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], end_id(tokenizer)]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer. Raises DataError where there is none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"data.tokenizer={tokenizer.name_or_path} has no end-of-text token to end an answer with; use another one"
        )
    return tokenizer.eos_token_id


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills a row up; attention masks and labels leave it out, so any token will do."""
    return end_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad_right(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    """Rows of different lengths as one (B, T) int64 tensor."""
    padded_BT = torch.full((len(rows), length), value, dtype=torch.int64)
    for row, ids in zip(padded_BT, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded_BT


class TaskRows:
    """One row per problem; the loss is on the answer and its end alone, as in TRL's completion-only training.

    Raises DataError for a problem without a stored answer, for one that does not fit ``sequence_length``, and where
    there is no problem at all.
    """

    def __init__(self, items: Sequence[TaskItem], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        if not items:
            raise DataError("tasks.size=0 leaves nothing to learn from; use 1 or more")
        self.sequence_length = sequence_length
        self.answers = [stored_answer(item) for item in items]
        self._padding = padding_id(tokenizer)
        self._prompts = [prompt_ids(tokenizer, item.prompt) for item in items]
        self._completions = [answer_ids(tokenizer, answer) for answer in self.answers]
        lengths = [len(p) + len(c) for p, c in zip(self._prompts, self._completions, strict=True)]
        if (longest := max(lengths)) > sequence_length:
            item = items[lengths.index(longest)]
            raise DataError(
                f"train.sequence_length={sequence_length} is too short for problem {item.index} of tasks.family="
                f"{item.family}, which takes {longest} tokens with its answer; use {longest} or more, or easier tasks"
            )

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def num_targets(self) -> int:
        """Labels in all rows together: the answers' tokens and their ends."""
        return sum(map(len, self._completions))

    @property
    def num_answer_bytes(self) -> int:
        """UTF-8 bytes of all answers, ends not counted."""
        return sum(len(answer.encode("utf-8", "surrogateescape")) for answer in self.answers)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self._prompts))

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest answer with its end."""
        return max(map(len, self._completions))

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows by number, in the order asked for; all tensors int64, shape (B, T).

        Returns:
            input_ids: prompt, answer, end, then padding.
            shift_labels: at t the token that follows input t where that is of the answer or its end, -100 elsewhere.
            attention_mask: 1 for what is no padding.

        Raises:
            IndexError: there is no such row.
        """
        chosen = [int(index) for index in indices]
        if chosen and (min(chosen) < 0 or max(chosen) >= len(self)):
            raise IndexError(f"row {min(chosen)}..{max(chosen)} asked for, rows are 0..{len(self) - 1}")
        rows = [[*self._prompts[index], *self._completions[index]] for index in chosen]
        labels = [
            [*([IGNORE_INDEX] * len(self._prompts[index]) + self._completions[index])[1:], IGNORE_INDEX]
            for index in chosen
        ]
        return {
            "input_ids": pad_right(rows, self.sequence_length, self._padding),
            "shift_labels": pad_right(labels, self.sequence_length, IGNORE_INDEX),
            "attention_mask": pad_right([[1] * len(row) for row in rows], self.sequence_length, 0),
        }


def stored_answer(item: TaskItem) -> str:
    """An item's answer. Raises DataError for a family that only scores."""
    if item.answer is None:
        raise DataError(
            f"tasks.family={item.family} stores no answers to learn from, only a way to score them; "
            "use another family, or mmada ppo"
        )
    return item.answer
