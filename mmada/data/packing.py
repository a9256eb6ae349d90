"""A token stream cut into rows of equal length, with labels and positions that respect the documents.

# B rows of a batch, T tokens of a row, S = T + 1 tokens that a row reads
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from mmada.errors import DataError

if TYPE_CHECKING:
    from mmada.data.shards import TokenStream

IGNORE_INDEX = -100  # torch's cross entropy leaves such labels out


class PackedRows:
    """Row i reads tokens [i*T, i*T + T] of the stream: T inputs, and the T tokens that follow them as labels.

    Neighbouring rows share one token, the last label of one being the first input of the next, so over all rows every
    token of every document but its first is a label exactly once.
    """

    def __init__(self, stream: "TokenStream", sequence_length: int) -> None:
        if sequence_length < 1:
            raise DataError(f"train.sequence_length={sequence_length} is too short; use 1 or more")
        self.stream = stream
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-(self.stream.num_tokens - 1) // self.sequence_length)

    @property
    def num_targets(self) -> int:
        """Labels in all rows together: every token but the first of each document."""
        return self.stream.num_tokens - self.stream.num_documents

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows by number, in the order asked for; all tensors int64, shape (B, T).

        Returns:
            input_ids: tokens; the last row of the stream is filled up with pad.
            shift_labels: at t the token that follows input t; -100 where that is padding or another document's
                first token. Already shifted: compare with the logits of the same position.
            position_ids: count from 0 at the row's start, at each document's start, and where padding starts; so
                two positions belong together if and only if the count does not restart between them.

        Raises:
            IndexError: there is no such row.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"row {indices.min()}..{indices.max()} asked for, rows are 0..{len(self) - 1}")
        tokens_BS, starts_BS, is_padding_BS = self._windows(indices)
        nothing_to_predict_BT = starts_BS[:, 1:] | is_padding_BS[:, 1:]
        shift_labels_BT = np.where(nothing_to_predict_BT, IGNORE_INDEX, tokens_BS[:, 1:])
        column_T = np.arange(self.sequence_length)
        last_start_BT = np.maximum.accumulate(np.where(starts_BS[:, :-1], column_T, 0), axis=1)
        return {
            "input_ids": torch.from_numpy(tokens_BS[:, :-1].copy()),
            "shift_labels": torch.from_numpy(shift_labels_BT),
            "position_ids": torch.from_numpy(column_T - last_start_BT),
        }

    def _windows(self, indices_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each row and its follower (int64), where a document or padding starts, and what is padding."""
        shape = (len(indices_B), self.sequence_length + 1)
        tokens_BS = np.full(shape, self.stream.pad_token_id, dtype=np.int64)
        starts_BS = np.zeros(shape, dtype=bool)
        begins_B = indices_B * self.sequence_length
        lengths_B = np.minimum(shape[1], self.stream.num_tokens - begins_B)
        for row, (begin, length) in enumerate(zip(begins_B.tolist(), lengths_B.tolist(), strict=True)):
            tokens, starts = self.stream.read(begin, begin + length)
            tokens_BS[row, :length] = tokens
            starts_BS[row, starts - begin] = True
            starts_BS[row, length : length + 1] = True
        return tokens_BS, starts_BS, np.arange(shape[1]) >= lengths_B[:, None]
