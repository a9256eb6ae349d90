"""What a layer keeps between forward passes: keys and values, or the state of a recurrence.

# B batch, T new tokens, S kept tokens, G key/value heads, K head width, D model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmada.nn.cache_join import JoinPlan, Pieces, padded_alike, take_rows
from mmada.nn.context import Context, front_order, take_columns

State = dict[str, Tensor]
Scan = Callable[[Tensor, State | None, Context], tuple[Tensor, State]]


def count_range(count_B: Tensor | int) -> tuple[int, int]:
    """The smallest and the largest, in one wait for the device."""
    if isinstance(count_B, int):
        return count_B, count_B
    smallest, largest = torch.stack(count_B.aminmax()).tolist()
    return smallest, largest


class KeyValues:
    """Keys and values (B, G, S, K) of the tokens so far; with ``window`` only of the last that many.

    Column c of row i is the row's token number ``offset + c``. Rows of different lengths end in unused columns.
    ``spare_columns``: where no gradients are recorded room is made for so many tokens ahead, and new ones are written
    into it; what earlier forward passes were handed stays as it was. With 0 every call copies what there is.
    """

    def __init__(self, window: int | None = None, spare_columns: int = 0) -> None:
        self.window, self.spare_columns = window, spare_columns
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.offset = 0
        self.recording = False
        self._settled: int | None = None  # tokens of the shortest row that a crop has left, while recording
        self._room: list[Tensor] = []  # whose columns from ``_begin`` on keys and values are; none where they are whole
        self._begin = 0

    def append(self, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor, int]:
        """Add (B, G, T, K) each. Returns all that this forward pass may look at, and the number of its column 0."""
        if self._settled is not None:
            self._trim(self._settled)
            self._settled = None
        if self.spare_columns and not (self.recording or torch.is_grad_enabled() or context.lengths_B is not None):
            keys, values = self._written(key, value, context)
        else:
            keys, values = self._joined(self.keys, key, context), self._joined(self.values, value, context)
            self._room = []
        offset = self.offset
        self.keys, self.values = keys, values
        if not self.recording:
            self._trim(context.total_range()[0])
        return keys, values, offset

    def _joined(self, old: Tensor | None, new: Tensor, context: Context) -> Tensor:
        """The old columns and the new ones behind each row's last."""
        if not context.is_ragged:
            return new if old is None else torch.cat([old, new], dim=2)
        width = context.total_range()[1] - self.offset
        if old is None and context.past == 0:  # padding stands behind, where columns are unused
            return new[:, :, :width]
        column_BT = context.index_BT().expand(context.shape) - self.offset
        valid_BT = context.valid_BT()
        if valid_BT is not None:
            column_BT = torch.where(valid_BT, column_BT, width)  # padding goes to a column that is cut off
        added = width - (0 if old is None else old.shape[2]) + (valid_BT is not None)
        blank = new.new_zeros(*new.shape[:2], added, new.shape[3])  # not empty: what no row uses must be finite
        kept = blank if old is None else torch.cat([old, blank], dim=2)
        index = column_BT[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        return kept.scatter_(2, index, new)[:, :, :width]

    def _written(self, key: Tensor, value: Tensor, context: Context) -> list[Tensor]:
        """As ``_joined`` of both, in the room that there is; T real tokens in every row."""
        width, length = context.total_range()[1] - self.offset, context.shape[1]
        if not self._room or self._begin + width > self._room[0].shape[2]:
            both = (self.keys, key), (self.values, value)
            self._room, self._begin = [self._with_room(old, new, width) for old, new in both], 0
        index = None
        if context.is_ragged:
            index = context.once(
                ("columns", self.offset, key.shape[1], key.shape[3]),
                lambda: (context.index_BT() - self.offset)[:, None, :, None].expand(key.shape),
            )
        written = []
        for room, new in zip(self._room, (key, value), strict=True):
            kept = room.narrow(2, self._begin, width)
            if index is None:
                kept.narrow(2, width - length, length).copy_(new)
            else:
                kept.scatter_(2, index, new)
            written.append(kept)
        return written

    def _with_room(self, old: Tensor | None, new: Tensor, width: int) -> Tensor:
        room = new.new_zeros(*new.shape[:2], width + self.spare_columns, new.shape[3])
        if old is not None:
            room[:, :, : old.shape[2]] = old
        return room

    def _trim(self, shortest: int) -> None:
        """Forget what no later token can see, when the shortest row has that many tokens."""
        if self.window is None or self.keys is None:
            return
        surplus = shortest - self.offset - self.window
        if surplus > 0:
            self.offset += surplus
            self.keys, self.values = self.keys[:, :, surplus:], self.values[:, :, surplus:]
            if self._room:
                self._begin += surplus
            else:  # so that what is cut off does not live on behind a view of the rest
                self.keys, self.values = self.keys.clone(), self.values.clone()

    def check_crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Raise ValueError where ``crop`` would need what is no longer kept."""
        most_removed, shortest = count_range(removed)[1], count_range(totals)[0]
        if most_removed and self.offset > 0 and shortest - self.window < self.offset:
            raise ValueError(
                f"crop({-most_removed}) reaches behind a window of {self.window} that has moved on; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` tokens of each row back, so that ``totals`` are left."""
        if self.keys is not None:
            shortest, longest = count_range(totals)
            self.keys, self.values = (kept[:, :, : longest - self.offset] for kept in (self.keys, self.values))
            self._room, self._settled = [], shortest  # trimmed when more comes: until then a crop may go further back

    def tensors(self) -> list[Tensor]:
        return [] if self.keys is None else [self.keys, self.values]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values, self._room = change(self.keys), change(self.values), []

    def reset(self) -> None:
        self.keys = self.values = self._settled = None
        self.offset, self._room = 0, []

    def joined(self, pieces: Pieces, plan: JoinPlan) -> KeyValues:
        """The rows of several as one, with the columns that some row can still see.

        What a row has not, or has let go of, is 0 and seen by none.
        """
        joint = KeyValues(self.window, plan.spare_columns)
        first = 0 if self.window is None else max(0, plan.shortest - self.window)
        width = plan.longest - first
        like = next((part.keys for part, _ in pieces if part is not None and part.keys is not None), None)
        if like is None or width <= 0:
            return joint
        joint.offset, num_rows, row = first, sum(len(rows_N) for _, rows_N in pieces), 0
        if pieces[0][0] is not None and pieces[0][0]._can_be_taken_over(num_rows, first, width, plan):
            joint._take_over(pieces[0][0], num_rows, plan)
            row, pieces = len(pieces[0][1]), pieces[1:]
        else:
            shape = (num_rows, like.shape[1], width + plan.spare_columns, like.shape[3])
            joint._room = [like.new_zeros(shape), like.new_zeros(shape)]
        for part, rows_N in pieces:
            if part is not None and part.keys is not None:
                begin, end = max(first, part.offset), min(plan.longest, part.offset + part.keys.shape[2])
                for room, kept in zip(joint._room, (part.keys, part.values), strict=True):
                    columns = room.narrow(2, joint._begin + begin - first, max(0, end - begin))
                    plan.write(
                        columns, row, take_rows(kept[:, :, begin - part.offset : max(begin, end) - part.offset], rows_N)
                    )
            row += len(rows_N)
        joint.keys, joint.values = (room.narrow(2, joint._begin, width) for room in joint._room)
        return joint

    def _can_be_taken_over(self, num_rows: int, first: int, width: int, plan: JoinPlan) -> bool:
        """Whether there is room here for so many rows and for ``width`` columns from token number ``first`` on."""
        if plan.moved is None or not self._room or first < self.offset:
            return False
        return num_rows <= len(self._room[0]) and self._begin + first - self.offset + width <= self._room[0].shape[2]

    def _take_over(self, other: KeyValues, num_rows: int, plan: JoinPlan) -> None:
        """Go on in the room of another, whose rows stay where they are but for those that are moved."""
        assert plan.moved is not None
        moved_M, places_M = plan.moved
        self._begin, self._room = other._begin + self.offset - other.offset, [room[:num_rows] for room in other._room]
        for room, whole in zip(self._room, other._room, strict=True):
            if len(moved_M):
                room.index_copy_(0, places_M.to(room.device), take_rows(whole, moved_M))


@dataclass
class _Span:
    """Tokens that can be taken back: the state before them, a scan's inputs (B, T, D), which are real (B, T)."""

    before: State | None
    hidden_BTD: Tensor
    valid_BT: Tensor


class Recurrent:
    """Tensors (B, ...) that a recurrence carries on, by name.

    While recording it also keeps the inputs since the last ``crop``, in spans, so that tokens can be taken back: the
    state from before the first span that lost one is put back, and what remains is run again at the next call.
    """

    span_size = 16  # of short calls: so many tokens share a kept state, and are run again to save keeping more

    def __init__(self) -> None:
        self.state: State | None = None
        self.recording = False
        self._spans: list[_Span] = []
        self._is_behind = False  # the state is from before the one span in the list

    def run(self, scan: Scan, hidden_BTD: Tensor, context: Context) -> Tensor:
        """``scan(hidden_BTD, state, context) -> (output, new state)`` from the kept state on; keeps the new one.

        The scan may read ``shape``, ``device``, ``lengths_B`` and ``past`` of its context, and leaves the tensors of
        the state that it is given as they are. Returns the output.
        """
        if self._is_behind:
            self._catch_up(scan, context)
        before = self.state
        output, self.state = scan(hidden_BTD, before, context)
        if self.recording:
            self._record(before, hidden_BTD, context.valid_BT())
        return output

    def _record(self, before: State | None, hidden_BTD: Tensor, valid_BT: Tensor | None) -> None:
        if valid_BT is None:
            valid_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        if self._spans and self._spans[-1].valid_BT.shape[1] + valid_BT.shape[1] <= self.span_size:
            last = self._spans.pop()
            before = last.before
            hidden_BTD = torch.cat([last.hidden_BTD, hidden_BTD], dim=1)
            valid_BT = torch.cat([last.valid_BT, valid_BT], dim=1)
        self._spans.append(_Span(before, hidden_BTD, valid_BT))

    def _catch_up(self, scan: Scan, context: Context) -> None:
        """Run what ``crop`` left over."""
        (span,) = self._spans
        lengths_B = span.valid_BT.sum(dim=1)
        past_B = torch.full_like(lengths_B, context.past) if context.past_B is None else context.past_B
        past_B = past_B - lengths_B
        again = Context(
            shape=(span.hidden_BTD.shape[0], span.hidden_BTD.shape[1]),
            device=span.hidden_BTD.device,
            position_ids_BT=past_B[:, None] + torch.arange(span.hidden_BTD.shape[1], device=past_B.device),
            lengths_B=lengths_B,
            past=count_range(past_B)[1],
            past_B=past_B,
        )
        self.state = scan(span.hidden_BTD, span.before, again)[1]
        self._spans, self._is_behind = [], False

    def check_crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Raise ValueError where ``crop`` would need what is no longer kept."""
        most_removed = count_range(removed)[1]
        is_used = self.state is not None or self._spans
        if most_removed and is_used and (not self._spans or count_range(self._left(removed))[0] < 0):
            raise ValueError(
                f"crop({-most_removed}) takes back tokens that a recurrent layer has not recorded; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )

    def _left(self, removed: Tensor | int) -> Tensor:
        """Recorded tokens of each row that are left after a crop, (B,)."""
        recorded_B = torch.cat([span.valid_BT for span in self._spans], dim=1).sum(dim=1)
        return recorded_B - torch.as_tensor(removed, device=recorded_B.device)

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` real tokens of each row back."""
        if count_range(removed)[1] == 0:
            self._spans = self._spans if self._is_behind else []
        elif self._spans:
            self._cut(self._left(removed))

    def _cut(self, lengths_B: Tensor) -> None:
        """Go back to the state before the first span that loses a token; keep so many tokens to be run again."""
        spans = self._spans
        while bool((spans[0].valid_BT.sum(dim=1) <= lengths_B).all()):  # whole in every row: the state after it stands
            lengths_B = lengths_B - spans[0].valid_BT.sum(dim=1)
            spans = spans[1:]
        hidden_BTD = torch.cat([span.hidden_BTD for span in spans], dim=1)
        order_BT = front_order(torch.cat([span.valid_BT for span in spans], dim=1))
        if order_BT is not None:
            hidden_BTD = take_columns(hidden_BTD, order_BT)
        longest = count_range(lengths_B)[1]
        valid_BT = torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]
        self.state, self._is_behind = spans[0].before, longest > 0
        self._spans = [_Span(self.state, hidden_BTD[:, :longest].clone(), valid_BT)] if longest else []

    def _states(self) -> dict[int, State]:
        """Every state that is kept, once: a span's is often that of its neighbour."""
        states = [self.state, *(span.before for span in self._spans)]
        return {id(state): state for state in states if state is not None}

    def tensors(self) -> list[Tensor]:
        kept = [tensor for state in self._states().values() for tensor in state.values()]
        return kept + [tensor for span in self._spans for tensor in (span.hidden_BTD, span.valid_BT)]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        changed = {
            key: {name: change(tensor) for name, tensor in state.items()} for key, state in self._states().items()
        }
        self.state = changed.get(id(self.state))
        self._spans = [
            _Span(changed.get(id(span.before)), change(span.hidden_BTD), change(span.valid_BT)) for span in self._spans
        ]

    def reset(self) -> None:
        self.state, self._spans, self._is_behind = None, [], False

    def joined(self, pieces: Pieces, plan: JoinPlan) -> Recurrent:
        """The rows of several as one. Where a state is not there yet, it is 0; where it is shorter, 0 is behind it.

        A state that is not there is that of a branch which no token took, and those start from 0 or, at a row's
        first token, by themselves.
        """
        joint = Recurrent()
        like = next((part.state for part, _ in pieces if part is not None and part.state is not None), None)
        for name in like or ():
            rows = [
                like[name].new_zeros(len(rows_N), *like[name].shape[1:])
                if part is None or part.state is None
                else take_rows(part.state[name], rows_N)
                for part, rows_N in pieces
            ]
            joint.state = {**(joint.state or {}), name: plan.arranged(torch.cat(padded_alike(rows)))}
        return joint
