"""Rows cut where the numbers of their tokens are multiples of a size, each row at its own place.

A row's first chunk takes what its open chunk has room for, every further one starts at a multiple of the size. The
tokens of a chunk stand at its front, so one new token per row is one column, wherever the rows are. All planning is
done on the CPU; only index tensors go to the device.

# B batch, R rows that differ: B, or 1 where all agree, T tokens, P chunks, C columns of a chunk
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmada.nn.context import Context


@dataclass(frozen=True)
class Rows:
    """``past_R`` tokens that the rows had, ``new_R`` of the ``length`` columns that they get now, in front layout.

    Both int64 on the CPU, of one entry where all rows agree.
    """

    length: int
    past_R: Tensor
    new_R: Tensor
    device: torch.device
    _cuts: dict[int, Chunks] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def even(length: int, past: int = 0, device: torch.device | str = "cpu") -> Rows:
        """All rows had ``past`` tokens and get ``length``."""
        return Rows(length, torch.tensor([past]), torch.tensor([length]), torch.device(device))

    @staticmethod
    def of(context: Context) -> Rows:
        """The rows of one forward pass."""

        def make() -> Rows:
            batch, length = context.shape
            if not context.is_ragged:
                return Rows.even(length, context.past, context.device)
            totals_B = context.totals_B()
            new_B = totals_B.new_full((batch,), length) if context.lengths_B is None else context.lengths_B
            totals_B, new_B = torch.stack([totals_B, new_B]).cpu()
            return Rows(length, totals_B - new_B, new_B, context.device)

        return context.once("rows", make)

    @property
    def lengths_R(self) -> Tensor | None:
        """Real tokens of each row, on the device; (1,) where all rows agree, None where all columns are real."""
        return None if bool((self.new_R == self.length).all()) else self.new_R.to(self.device)

    def context(self, batch: int) -> Context:
        """The same for layers that want a context."""
        even = len(self.past_R) == 1
        index_T = torch.arange(self.length, device=self.device)
        return Context(
            shape=(batch, self.length),
            device=self.device,
            position_ids_BT=(self.past_R.to(self.device)[:, None] + index_T).expand(batch, -1),
            lengths_B=None if self.lengths_R is None else self.lengths_R.expand(batch),
            past=int(self.past_R.max()),
            past_B=None if even else self.past_R.to(self.device),
        )

    def times(self, factor: int) -> Rows:
        """Every token as ``factor`` of them."""
        return Rows(self.length * factor, self.past_R * factor, self.new_R * factor, self.device)

    def cut(self, size: int) -> Chunks:
        """The rows in chunks of ``size`` tokens."""
        if size not in self._cuts:
            self._cuts[size] = _cut(self, size)
        return self._cuts[size]


@dataclass(frozen=True)
class Chunks:
    """``rows[p]``: the rows as chunk p sees them; the tokens they had are those of their chunk.

    ``opens[p]``: whether they begin a chunk there, (B,) where they differ.

    ``valid_RPC``: which columns hold a token; None where all do.
    """

    rows: list[Rows]
    opens: list[bool | Tensor]
    valid_RPC: Tensor | None
    _source_RX: Tensor | None  # the token of each of the P·C columns; None where they are the tokens in order
    _column_RT: Tensor | None  # the column of each token, likewise

    def take(self, states: Tensor, dim: int) -> Tensor:
        """(B, ..., T, ...) to (B, ..., P, C, ...); columns without a token repeat some token."""
        states = states if self._source_RX is None else _pick(states, self._source_RX, dim)
        return states.unflatten(dim, (len(self.rows), -1))

    def put(self, states: Tensor, dim: int) -> Tensor:
        """(B, ..., P, C, ...) to (B, ..., T, ...); what padding gets means nothing."""
        states = states.flatten(dim, dim + 1)
        return states if self._column_RT is None else _pick(states, self._column_RT, dim)


def _cut(rows: Rows, size: int) -> Chunks:
    offset_R, device = rows.past_R % size, rows.device
    num_chunks = max(1, int((offset_R + rows.new_R).max() + size - 1) // size)
    edge_RP = (torch.arange(num_chunks + 1) * size - offset_R[:, None]).clamp(min=0).minimum(rows.new_R[:, None])
    begin_RP, count_RP = edge_RP[:, :-1], edge_RP.diff(dim=1)
    width = max(1, int(count_RP.max()))
    column_C = torch.arange(width)
    before_RP = (rows.past_R[:, None] + begin_RP) % size
    pieces = [Rows(width, before_RP[:, p], count_RP[:, p], device) for p in range(num_chunks)]
    opens_RP = (count_RP > 0) & (before_RP == 0)
    opens = [
        bool(opens_R[0]) if (opens_R == opens_R[0]).all() else opens_R.to(device) for opens_R in opens_RP.unbind(dim=1)
    ]
    valid_RPC = column_C < count_RP[..., None]
    valid = None if bool(valid_RPC.all()) else valid_RPC.to(device)
    token_T = torch.arange(rows.length)
    source_RX = (begin_RP[..., None] + column_C).clamp(max=rows.length - 1).flatten(1)
    if source_RX.shape[1] == rows.length and bool((source_RX == token_T).all()):
        return Chunks(pieces, opens, valid, None, None)
    chunk_RT = ((offset_R[:, None] + token_T) // size).clamp(max=num_chunks - 1)
    column_RT = chunk_RT * width + token_T - begin_RP.gather(1, chunk_RT)
    column_RT = column_RT.clamp(max=num_chunks * width - 1)
    return Chunks(pieces, opens, valid, source_RX.to(device), column_RT.to(device))


def _pick(states: Tensor, index_RX: Tensor, dim: int) -> Tensor:
    """Entries of ``dim`` in the given order, which may differ by row; batch first."""
    if index_RX.shape[0] == 1:
        return states.index_select(dim, index_RX[0])
    index = index_RX.view(index_RX.shape[0], *[1] * (dim - 1), -1, *[1] * (states.dim() - dim - 1))
    shape = list(states.shape)
    shape[dim] = index_RX.shape[1]
    return states.gather(dim, index.expand(shape))
