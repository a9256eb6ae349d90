"""What a layer keeps between forward passes: keys and values, or the state of a recurrence.

# B batch, T new tokens, S kept tokens, G key/value heads, K head width, D model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.offset = 0
        self.recording = False
        self._settled: int | None = None  # tokens of the shortest row that a crop has left, while recording

    def append(self, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor, int]:
        """Add (B, G, T, K) each. Returns all that this forward pass may look at, and the number of its column 0."""
        if self._settled is not None:
            self._trim(self._settled)
            self._settled = None
        keys, values = self._joined(self.keys, key, context), self._joined(self.values, value, context)
        offset = self.offset
        self.keys, self.values = keys, values
        if not self.recording:
            self._trim(context.total_range()[0])
        return keys, values, offset

    def _joined(self, old: Tensor | None, new: Tensor, context: Context) -> Tensor:
        if not context.is_ragged:
            return new if old is None else torch.cat([old, new], dim=2)
        column_BT = context.index_BT().expand(context.shape) - self.offset
        width = context.total_range()[1] - self.offset
        valid_BT = context.valid_BT()
        if valid_BT is not None:
            column_BT = torch.where(valid_BT, column_BT, width)  # padding goes to a column that is cut off
        added = width - (0 if old is None else old.shape[2]) + (valid_BT is not None)
        blank = new.new_zeros(*new.shape[:2], added, new.shape[3])  # not empty: what no row uses must be finite
        kept = blank if old is None else torch.cat([old, blank], dim=2)
        index = column_BT[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        return kept.scatter_(2, index, new)[:, :, :width]

    def _trim(self, shortest: int) -> None:
        """Forget what no later token can see, when the shortest row has that many tokens."""
        if self.window is None or self.keys is None:
            return
        surplus = shortest - self.offset - self.window
        if surplus > 0:
            self.offset += surplus
            # Cloned, so that what is cut off does not live on behind a view of the rest.
            self.keys, self.values = self.keys[:, :, surplus:].clone(), self.values[:, :, surplus:].clone()

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
            self._settled = shortest  # trimmed when more comes: until then a crop may go further back

    def tensors(self) -> list[Tensor]:
        return [] if self.keys is None else [self.keys, self.values]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def reset(self) -> None:
        self.keys = self.values = self._settled = None
        self.offset = 0


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
