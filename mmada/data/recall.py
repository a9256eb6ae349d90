"""Multi-query associative recall: pairs of a key and a value, then keys whose values are asked for.

The synthetic task that tells what a sequence mixer can hold (Zoology, arXiv:2312.04927). Rows are made on the fly, a
pure function of (seed, step).

# B rows of a batch, T tokens of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmada.data.packing import IGNORE_INDEX


@dataclass(frozen=True)
class RecallTask:
    """How the rows look: ``num_pairs`` pairs, filler, then every key once more in another order with its value.

    ``length``: tokens of a row; what pairs and questions leave of it is filler between them, so the questions lie
    ``length - 4 * num_pairs`` tokens behind the last pair.
    ``num_symbols``: different keys, and different values. Ids begin at ``first_id``: keys, values, then one filler.
    """

    num_pairs: int
    length: int
    num_symbols: int = 64
    first_id: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.num_pairs <= self.num_symbols:
            raise ValueError(
                f"num_pairs={self.num_pairs} is not between 1 and num_symbols={self.num_symbols}; use fewer"
            )
        if self.length < 4 * self.num_pairs:
            raise ValueError(
                f"length={self.length} has no room for {self.num_pairs} pairs and as many questions; "
                f"use {4 * self.num_pairs} or more"
            )

    @property
    def vocab_size(self) -> int:
        """Ids that a model of the task must know."""
        return self.first_id + 2 * self.num_symbols + 1

    def batch(self, seed: int, step: int, rows: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``shift_labels`` (B, T), int64; labels are the values asked for, -100 elsewhere."""
        generator = np.random.default_rng([seed, step])
        order = generator.permuted(np.tile(np.arange(self.num_symbols), (rows, 1)), axis=1)[:, : self.num_pairs]
        keys = self.first_id + order
        values = self.first_id + self.num_symbols + generator.integers(self.num_symbols, size=keys.shape)
        asked = generator.permuted(np.tile(np.arange(self.num_pairs), (rows, 1)), axis=1)
        filler = np.full((rows, self.length - 4 * self.num_pairs), self.first_id + 2 * self.num_symbols)
        pairs = np.stack([keys, values], axis=2).reshape(rows, -1)
        picked = (np.take_along_axis(each, asked, axis=1) for each in (keys, values))
        questions = np.stack(list(picked), axis=2).reshape(rows, -1)
        tokens = np.concatenate([pairs, filler, questions], axis=1)
        labels = np.full_like(tokens, IGNORE_INDEX)
        first_question = self.length - 2 * self.num_pairs
        labels[:, first_question::2] = tokens[:, first_question + 1 :: 2]
        return {"input_ids": torch.from_numpy(tokens), "shift_labels": torch.from_numpy(labels)}
