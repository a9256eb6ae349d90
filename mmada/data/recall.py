"""Multi-query associative recall: pairs of a key and a value, then keys whose values are asked for.

The synthetic task that tells what a sequence mixer can hold (Zoology, arXiv:2312.04927). A pair is one token here, so
that one layer can answer and small models learn it in minutes. Rows are made on the fly, a pure function of
(seed, step).

# B rows of a batch, T tokens of a row
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmada.data.packing import IGNORE_INDEX


@dataclass(frozen=True)
class RecallTask:
    """How the rows look: ``num_pairs`` pairs, filler, then every key once more in another order.

    ``length``: tokens of a row; what pairs and questions leave of it is filler between them, so the questions lie
    ``length - 2 * num_pairs`` tokens behind the last pair.
    ``num_symbols``: different keys, and different values. Ids begin at ``first_id``: one for each pair, then the keys
    that are asked for, the values that answer, and one filler.
    """

    num_pairs: int
    length: int
    num_symbols: int = 12
    first_id: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.num_pairs <= self.num_symbols:
            raise ValueError(
                f"num_pairs={self.num_pairs} is not between 1 and num_symbols={self.num_symbols}; use fewer"
            )
        if self.length < 2 * self.num_pairs:
            raise ValueError(
                f"length={self.length} has no room for {self.num_pairs} pairs and as many questions; "
                f"use {2 * self.num_pairs} or more"
            )

    @property
    def vocab_size(self) -> int:
        """Ids that a model of the task must know."""
        return self.first_id + self.num_symbols * (self.num_symbols + 2) + 1

    def batch(self, seed: int, step: int, rows: int) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``shift_labels`` (B, T), int64; labels are the values asked for, -100 elsewhere."""
        generator, symbols = np.random.default_rng([seed, step]), self.num_symbols
        keys = generator.permuted(np.tile(np.arange(symbols), (rows, 1)), axis=1)[:, : self.num_pairs]
        values = generator.integers(symbols, size=keys.shape)
        order = generator.permuted(np.tile(np.arange(self.num_pairs), (rows, 1)), axis=1)
        asked, answers = (np.take_along_axis(each, order, axis=1) for each in (keys, values))
        first_question = self.first_id + symbols * symbols
        filler = np.full((rows, self.length - 2 * self.num_pairs), self.vocab_size - 1)
        pairs = self.first_id + keys * symbols + values
        tokens = np.concatenate([pairs, filler, first_question + asked], axis=1)
        labels = np.full_like(tokens, IGNORE_INDEX)
        labels[:, -self.num_pairs :] = first_question + symbols + answers
        return {"input_ids": torch.from_numpy(tokens), "shift_labels": torch.from_numpy(labels)}
