"""Which tokens a token may look at, and how far away they are.

# B batch, T queries, S keys, t and s parts of them, H query heads, N distances that a bias is known for
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmada.nn.attention.block_pattern import BlockPattern
from mmada.nn.context import Context

ALL = slice(None)


@dataclass
class Visibility:
    """The rule by which queries see keys; any part of the (T, S) mask can be had from it without the whole.

    ``query_BT``: the queries' token numbers in their rows, (B, T), or (1, T) where all rows agree; ``past``, or
        ``past_B``: the numbers of the first queries.
    ``num_keys``: key columns; the first ``num_persistent`` are no tokens and everybody sees them, the one after
        them is token number ``offset``.
    ``window``: tokens that a query sees, itself among them; None: all up to itself. ``documents_BT``: only those of
        its own document. ``pattern``: only those in the blocks that it chooses.
    """

    query_BT: Tensor
    num_keys: int
    past: int = 0
    past_B: Tensor | None = None
    offset: int = 0
    window: int | None = None
    num_persistent: int = 0
    documents_BT: Tensor | None = None
    pattern: BlockPattern | None = None
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, context: Context, num_tokens: int, offset: int = 0, window: int | None = None,
           num_persistent: int = 0, pattern: BlockPattern | None = None) -> Visibility:  # fmt: skip
        """What the tokens of one forward pass see among ``num_tokens`` keys from number ``offset`` on."""
        query_BT, documents_BT = context.index_BT(), context.documents_BT
        # Padding stands behind a row's tokens: where the row begins here, causality hides it from all that matter, and
        # plain causality is cheaper than a mask. It rounds otherwise, though, and training is compared to the bit.
        is_hidden = context.past == 0 and context.past_B is None and documents_BT is None
        if context.is_ragged and (torch.is_grad_enabled() or not is_hidden):
            # Padding looks where the last real token looks, so that it always sees something.
            query_BT = torch.minimum(query_BT, context.totals_B()[:, None] - 1).clamp(min=0)
            if documents_BT is not None:  # then no cache: numbers are columns
                documents_BT = documents_BT.gather(1, query_BT)
        return cls(
            query_BT=query_BT,
            num_keys=num_persistent + num_tokens,
            past=context.past,
            past_B=context.past_B,
            offset=offset,
            window=window,
            num_persistent=num_persistent,
            documents_BT=documents_BT,
            pattern=pattern,
        )

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def num_queries(self) -> int:
        return self.query_BT.shape[1]

    @property
    def num_tokens(self) -> int:
        """Key columns that are tokens."""
        return self.num_keys - self.num_persistent

    @cached_property
    def past_range(self) -> tuple[int, int]:
        """The smallest and the largest number of a row's first query."""
        return (self.past, self.past) if self.past_B is None else (int(self.past_B.min()), int(self.past_B.max()))

    @property
    def is_plain(self) -> bool:
        """Whether each query sees just the columns up to its own, or the only query sees all."""
        if self.past_B is not None or self.documents_BT is not None or self.pattern is not None:
            return False
        if self.window is not None and self.window < self.num_tokens:
            return False
        last = self.past + self.num_queries == self.offset + self.num_tokens
        square = self.num_persistent == 0 and self.num_queries == self.num_tokens
        return last and (square or self.num_queries == 1)

    @cached_property
    def dense(self) -> Tensor | None:
        """The whole mask, (B or 1, 1, T, S); None where it is plain causality."""
        return None if self.is_plain else self.mask()

    def key_numbers(self, keys: slice = ALL) -> Tensor:
        """Token numbers of key columns; of persistent ones they mean nothing."""
        first, stop, _ = keys.indices(self.num_keys)
        return torch.arange(first, stop, device=self.query_BT.device) + (self.offset - self.num_persistent)

    def mask(self, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """True where a query sees a key, (B or 1, 1, t, s)."""
        query_BT1 = self.query_BT[:, queries, None]
        key_S = self.key_numbers(keys)
        seen = key_S <= query_BT1
        if self.window is not None:
            seen = seen & (key_S > query_BT1 - self.window)
        if self.documents_BT is not None:
            column_S = key_S.clamp(min=0)  # documents come without a cache: numbers are columns
            seen = seen & (self.documents_BT[:, queries, None] == self.documents_BT[:, None, column_S])
        if self.pattern is not None:
            seen = seen & self.chosen_blocks[self.query_blocks[:, queries, None], self.key_blocks[:, None, keys]]
        if self.num_persistent:
            seen = seen | (key_S < self.offset)
        return seen[:, None]

    def distance(self, num_distances: int, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """How far back each key is, (B or 1, t, s), at most ``num_distances - 1``; ``num_distances`` for no token."""
        key_S = self.key_numbers(keys)
        distance = (self.query_BT[:, queries, None] - key_S).clamp(0, num_distances - 1)
        return distance.masked_fill(key_S < self.offset, num_distances)

    def bias(self, bias_HN: Tensor, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """A bias by distance for every pair, (B or 1, H, t, s); 0 on persistent keys."""
        if self.query_BT.shape[0] > 1 or self.num_persistent:
            return bias_at(bias_HN, self.distance(bias_HN.shape[1], queries, keys))
        # Numbers rise by one along both sides (behind a row's end they mean nothing): each row is the one below it
        # moved on by a column.
        key_S, query_T = self.key_numbers(keys), self.query_BT[0, queries]
        num_queries, num_keys = query_T.shape[0], key_S.shape[0]
        back = torch.arange(num_queries + num_keys - 1, device=key_S.device)
        distance = (query_T[0] + num_queries - 1 - key_S[0] - back).clamp(0, bias_HN.shape[1] - 1)
        return bias_HN[:, distance].unfold(1, num_keys, 1).flip(1)[None]

    def coverage(self, queries: slice, keys: slice) -> bool | None:
        """True where these queries see all these keys, False where none sees any, None where the mask must tell.

        Both slices have whole numbers at both ends. Not for patterns, which this would not see through.
        """
        low, high = self.past_range
        first_query, last_query = low + queries.start, high + queries.stop - 1
        shift = self.offset - self.num_persistent
        first_key, last_key = keys.start + shift, keys.stop - 1 + shift
        behind = self.window is not None and last_key <= first_query - self.window
        if keys.start >= self.num_persistent and (behind or first_key > last_query):
            return False
        reached = self.window is None or first_key > last_query - self.window
        return True if last_key <= first_query and reached and self.documents_BT is None else None

    @cached_property
    def document_starts(self) -> Tensor:
        """The column where each token's document begins, (B, T); (1, 1) of 0 where rows are one document each."""
        if self.documents_BT is None:
            return self.query_BT.new_zeros(1, 1)
        opens_BT = pad(self.documents_BT[:, 1:] != self.documents_BT[:, :-1], (1, 0))
        return (opens_BT * torch.arange(self.num_queries, device=opens_BT.device)).cummax(dim=1).values

    @cached_property
    def query_blocks(self) -> Tensor:
        """The number of each query's block, counted from where its document begins, (B or 1, T)."""
        return (self.query_BT - self.document_starts) // self.pattern.size

    @cached_property
    def key_blocks(self) -> Tensor:
        """Likewise of each key's block, (B or 1, S); 0 for persistent ones."""
        numbers_BS = self.key_numbers()[self.num_persistent :] - self.document_starts
        return pad(numbers_BS // self.pattern.size, (self.num_persistent, 0))

    @cached_property
    def chosen_blocks(self) -> Tensor:
        """Which key blocks each query block sees by the pattern, (query blocks, key blocks)."""
        last = max(self.past_range[1] + self.num_queries, self.offset + self.num_tokens) - 1
        return self.pattern.table(last // self.pattern.size + 1, self.query_BT.device)


def bias_at(bias_HN: Tensor, distance_Bts: Tensor) -> Tensor:
    """A bias by distance at those distances, (B, H, t, s); 0 at the distance N."""
    return pad(bias_HN, (0, 1))[:, distance_Bts].transpose(0, 1)
