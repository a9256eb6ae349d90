"""Pairs of completions of which one is better: made from tasks, or read from JSONL.

# B pairs of a batch, 2 the better and the worse, T tokens of a row, H components of the reward
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmada.data.task_rows import pad_right, padding_id, stored_answer
from mmada.errors import DataError
from mmada.reward_model import COMPONENTS, scored_ids
from mmada.training.reward_proxies import ByteBigrams, correctness, creativity, faithfulness

if TYPE_CHECKING:
    from mmada.data.tasks import TaskItem, TaskSet

Scores = tuple[float | None, ...]  # one per component, in [-1, 1]; None where unknown
UNKNOWN: Scores = (None,) * len(COMPONENTS)
# What is wrong with the worse completion of a pair that was made from a task.
KINDS = ("near", "other", "corrupted", "repetitive")


@dataclass(frozen=True)
class PreferencePair:
    """One question, a better and a worse completion, and what is known of each component of either."""

    prompt: str
    chosen: str
    rejected: str
    kind: str = "given"
    chosen_scores: Scores = UNKNOWN
    rejected_scores: Scores = UNKNOWN


@dataclass(frozen=True)
class Preferences:
    """Pairs to learn from and pairs held out; ``fingerprint`` names their content."""

    train: list[PreferencePair]
    held_out: list[PreferencePair]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for pair in (*self.train, None, *self.held_out):
            digest.update(repr(pair).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]


def preferences_of_tasks(tasks: TaskSet, seed: int) -> Preferences:
    """Every problem's right answer against a wrong one of each kind; what is wrong is a function of the seed.

    ``near``: wrong but well formed; ``other``: the answer of another question; ``corrupted``: half of its characters
    drawn by chance; ``repetitive``: the right answer over and over. A kind that the scorer would not tell from the
    right answer is left out. The proxies' model of bytes knows the answers of the problems to learn from alone.
    Raises DataError for a family without stored answers.
    """
    answers: dict[str, list[str]] = defaultdict(list)
    for item in tasks.train:
        answers[item.family].append(stored_answer(item))
    bigrams = {family: ByteBigrams(known) for family, known in answers.items()}

    def scores(item: TaskItem, completion: str, score: float) -> Scores:
        coherence = bigrams[item.family].coherence(completion)
        return faithfulness(item.prompt, completion), coherence, correctness(score), creativity(completion)

    def pairs(items: Sequence[TaskItem], part: str) -> list[PreferencePair]:
        found = []
        for item in items:
            right = stored_answer(item)
            best = tasks.score(item, right)
            for kind in KINDS:
                chance = random.Random(f"{seed}/{part}/{item.family}/{item.index}/{kind}")
                wrong = wrong_answer(kind, right, answers[item.family], chance)
                if wrong is not None and (score := score_of_any(tasks, item, wrong)) < best:
                    sides = scores(item, right, best), scores(item, wrong, score)
                    found.append(PreferencePair(item.prompt, right, wrong, kind, *sides))
        return found

    return _checked(Preferences(pairs(tasks.train, "train"), pairs(tasks.held_out, "held_out")), "tasks")


def score_of_any(tasks: TaskSet, item: TaskItem, completion: str) -> float:
    """A verifier's score of any text: 0 where the scorer takes it for no answer at all and raises."""
    try:
        return tasks.score(item, completion)
    except Exception:  # of any kind: reasoning-gym's scorers raise whatever their parsing runs into
        return 0.0


def wrong_answer(kind: str, right: str, known: Sequence[str], chance: random.Random) -> str | None:
    """A wrong answer of that kind, or None where there is none; ``known`` are right answers of the family."""
    makers: dict[str, Callable[[], str | None]] = {
        "near": lambda: _near(right, known, chance),
        "other": lambda: _other(right, known, chance),
        "corrupted": lambda: _corrupted(right, chance),
        "repetitive": lambda: right * chance.randint(3, 5),
    }
    wrong = makers[kind]()
    return None if wrong == right else wrong


def _near(right: str, known: Sequence[str], chance: random.Random) -> str | None:
    """One digit changed; another of a few possible answers; or two neighbours exchanged."""
    digits = [place for place, char in enumerate(right) if char.isascii() and char.isdigit()]
    if digits:
        place = chance.choice(digits)
        return right[:place] + chance.choice([d for d in "123456789" if d != right[place]]) + right[place + 1 :]
    if 4 * len(set(known)) <= len(known):
        return _other(right, known, chance)
    swaps = [place for place in range(len(right) - 1) if right[place] != right[place + 1]]
    if not swaps:
        return None
    place = chance.choice(swaps)
    return right[:place] + right[place + 1] + right[place] + right[place + 2 :]


def _other(right: str, known: Sequence[str], chance: random.Random) -> str | None:
    others = sorted(set(known) - {right})
    return chance.choice(others) if others else None


def _corrupted(right: str, chance: random.Random) -> str:
    noise = string.ascii_letters + string.digits + string.punctuation
    places = set(chance.sample(range(len(right)), -(-len(right) // 2)))
    return "".join(chance.choice(noise) if place in places else char for place, char in enumerate(right))


def read_preferences(path: str, held_out: float, limit: int | None = None) -> Preferences:
    """Pairs from a JSONL file, or all ``*.jsonl`` of a folder: text under ``prompt``, ``chosen``, ``rejected``.

    Optional: ``chosen_scores`` and ``rejected_scores``, a number in [-1, 1] for any of the components by name. All
    pairs of one prompt fall on the same side. Raises DataError naming the file and line.
    """
    root = Path(path).expanduser()
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise DataError(f"data.path={path} holds no *.jsonl; give a file of preference pairs or a folder of them")
    found: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    count = 0
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # JSON strings may hold what else ends a line
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.path={file} cannot be read ({error}); give a JSONL file in UTF-8") from error
        for number, line in enumerate(lines, start=1):
            if line.strip() and (limit is None or count < limit):
                pair = _read_pair(line, f"data.path={file}: line {number}")
                found[_is_held_out(pair.prompt, held_out)].append(pair)
                count += 1
    return _checked(Preferences(*found), f"data.path={path}")


def _read_pair(line: str, where: str) -> PreferencePair:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error.msg}); write one object per line") from error
    if not isinstance(values, dict) or not all(
        isinstance(values.get(k), str) for k in ("prompt", "chosen", "rejected")
    ):
        raise DataError(f"{where} is no preference pair; write text under prompt, chosen and rejected")
    if values["chosen"] == values["rejected"]:
        raise DataError(f"{where} prefers a completion to itself; leave it out")
    sides = [_read_scores(values.get(f"{side}_scores"), f"{where}: {side}_scores") for side in ("chosen", "rejected")]
    return PreferencePair(values["prompt"], values["chosen"], values["rejected"], "given", *sides)


def _read_scores(values: Any, where: str) -> Scores:
    if values is None:
        return UNKNOWN
    if not isinstance(values, dict) or not values.keys() <= set(COMPONENTS):
        raise DataError(f"{where} is not by component; use any of {', '.join(COMPONENTS)}")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1 <= value <= 1:
            raise DataError(f"{where}.{name}={value} is no number from -1 to 1; write one")
    return tuple(values.get(name) for name in COMPONENTS)


def _is_held_out(prompt: str, share: float) -> bool:
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _checked(preferences: Preferences, source: str) -> Preferences:
    for part, pairs in (("to learn from", preferences.train), ("held out", preferences.held_out)):
        if not pairs:
            raise DataError(f"{source} gives no preference pair {part}; give more of it")
    return preferences


class PairRows:
    """One row per pair. Raises DataError for a completion that does not fit ``sequence_length`` with its prompt."""

    def __init__(
        self, pairs: Sequence[PreferencePair], tokenizer: PreTrainedTokenizerBase, sequence_length: int
    ) -> None:
        self.pairs, self.sequence_length = pairs, sequence_length
        self._padding = padding_id(tokenizer)
        self._ids = [
            [scored_ids(tokenizer, pair.prompt, text) for text in (pair.chosen, pair.rejected)] for pair in pairs
        ]
        longest = max(max(len(ids) for ids in row) for row in self._ids)
        if longest > sequence_length:
            raise DataError(
                f"train.sequence_length={sequence_length} is too short for a completion that takes {longest} tokens "
                f"with its prompt; use {longest} or more"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows by number, in the order asked for.

        Returns:
            input_ids, attention_mask: (B, 2, T) int64, the better completion first, padded at the right.
            proxies: (B, 2, H) float32, NaN where unknown.
        """
        chosen = [int(index) for index in indices]
        rows = [ids for index in chosen for ids in self._ids[index]]
        shape = (len(chosen), 2, self.sequence_length)
        scores = [side for i in chosen for side in (self.pairs[i].chosen_scores, self.pairs[i].rejected_scores)]
        known = [[float("nan") if value is None else value for value in side] for side in scores]
        return {
            "input_ids": pad_right(rows, self.sequence_length, self._padding).view(shape),
            "attention_mask": pad_right([[1] * len(ids) for ids in rows], self.sequence_length, 0).view(shape),
            "proxies": torch.tensor(known).view(len(chosen), 2, len(COMPONENTS)),
        }
