"""What a model keeps between forward passes: one cache for any mixture of layers.

A layer's mixer owns its state: it asks ``cache.layers[layer_idx]`` for the parts that it needs, by name, and each
part knows how to grow, to be reordered, cut back and measured. Keys and values are one kind of part, everything that
is carried from token to token (convolution inputs, state spaces, memories) the other.

# B batch, T new tokens, S kept tokens, G key/value heads, K head width, D model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmada.nn.context import Context, front_order, take_columns

State = dict[str, Tensor]
Scan = Callable[[Tensor, State | None, Context], tuple[Tensor, State]]


def _range(count_B: Tensor | int) -> tuple[int, int]:
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

    def append(self, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor, int]:
        """Add (B, G, T, K) each. Returns all that this forward pass may look at, and the number of its column 0."""
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
        kept = new.new_zeros(*new.shape[:2], width + 1, new.shape[3])
        if old is not None:
            kept[:, :, : min(width, old.shape[2])] = old[:, :, :width]
        index = column_BT[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        return kept.scatter(2, index, new)[:, :, :width]

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
        most_removed, shortest = _range(removed)[1], _range(totals)[0]
        if most_removed and self.offset > 0 and shortest - self.window < self.offset:
            raise ValueError(
                f"crop({-most_removed}) reaches behind a window of {self.window} that has moved on; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` tokens of each row back, so that ``totals`` are left."""
        if self.keys is not None:
            shortest, longest = _range(totals)
            self.keys, self.values = (kept[:, :, : longest - self.offset] for kept in (self.keys, self.values))
            self._trim(shortest)

    def tensors(self) -> list[Tensor]:
        return [] if self.keys is None else [self.keys, self.values]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def reset(self) -> None:
        self.keys = self.values = None
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
            past=_range(past_B)[1],
            past_B=past_B,
        )
        self.state = scan(span.hidden_BTD, span.before, again)[1]
        self._spans, self._is_behind = [], False

    def check_crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Raise ValueError where ``crop`` would need what is no longer kept."""
        most_removed = _range(removed)[1]
        is_used = self.state is not None or self._spans
        if most_removed and is_used and (not self._spans or _range(self._left(removed))[0] < 0):
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
        if _range(removed)[1] == 0:
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
        longest = _range(lengths_B)[1]
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


class LayerState(CacheLayerMixin):
    """The parts of one layer's state, made when they are first asked for."""

    supports_early_init = False  # only a mixer knows its parts

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}
        self.record_past = False

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name; ``make()`` the first time."""
        if name not in self.parts:
            self.parts[name] = make()
            self.parts[name].recording = self.record_past
        return self.parts[name]

    def key_values(self, name: str = "key_values", window: int | None = None) -> KeyValues:
        """Keys and values under ``name``; ``window`` counts at the first call."""
        return self.part(name, lambda: KeyValues(window))

    def recurrent(self, name: str) -> Recurrent:
        """The recurrent state under ``name``."""
        return self.part(name, Recurrent)

    def activate_past_recording(self) -> None:
        """From now on keep what ``crop`` needs to take tokens back, until the next ``crop``."""
        self.record_past = True
        for part in self.parts.values():
            part.recording = True

    @property
    def is_croppable(self) -> bool:
        return self.record_past

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts.values() for tensor in part.tensors()]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts.values():
            part.map(change)

    def reset(self) -> None:
        for part in self.parts.values():
            part.reset()

    # transformers' layer interface; lengths are kept by the cache, not by its layers.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a layer's parts are made by its mixer")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("mixers append to cache.layers[layer_idx].key_values()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("mixers build their masks from the context")

    def get_seq_length(self) -> int:
        raise NotImplementedError("ask the cache")

    def get_max_length(self) -> int:
        return -1


class MMaDACache(Cache):
    """The state of all layers, and how many tokens it is of.

    ``columns`` counts what was fed, padding included; rows that had padding differ in the real tokens they hold.
    ``valid_BS`` says which columns were real, None where all were.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])
        self.valid_BS: Tensor | None = None
        self.columns = 0

    @property
    def lengths_B(self) -> Tensor | None:
        """Real tokens per row, or None where all columns are real."""
        return None if self.valid_BS is None else self.valid_BS.sum(dim=1)

    def advance(self, columns: int, valid_BT: Tensor | None) -> None:
        """Count ``columns`` new ones, after all layers have taken them; ``valid_BT`` None means all are real."""
        if self.valid_BS is None and valid_BT is not None:
            self.valid_BS = valid_BT.new_ones(valid_BT.shape[0], self.columns)
        if self.valid_BS is not None:
            new = self.valid_BS.new_ones(self.valid_BS.shape[0], columns) if valid_BT is None else valid_BT
            self.valid_BS = torch.cat([self.valid_BS, new], dim=1)
        self.columns += columns

    def num_bytes(self) -> int:
        """Bytes of all tensors that are kept."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included, the same for all layers."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def is_initialized(self) -> bool:
        """Whether anything was fed."""
        return self.columns > 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back, as many as the negative number says; 0 only forgets what was recorded.

        Raises ValueError where a layer no longer has what that needs.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is positive; give the columns to remove as a negative number")
        if -tokens_to_remove > self.columns:
            raise ValueError(f"crop({tokens_to_remove}) removes more than the {self.columns} columns that there are")
        columns = self.columns + tokens_to_remove
        removed: Tensor | int = -tokens_to_remove
        totals: Tensor | int = columns
        valid_BS = self.valid_BS
        if valid_BS is not None:
            removed, valid_BS = valid_BS[:, columns:].sum(dim=1), valid_BS[:, :columns]
            totals = valid_BS.sum(dim=1)
        parts = [part for layer in self.layers for part in layer.parts.values()]
        for part in parts:  # first, so that a crop that is refused changes nothing
            part.check_crop(totals, removed)
        for part in parts:
            part.crop(totals, removed)
        self.columns, self.valid_BS = columns, valid_BS

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map(change)
        if self.valid_BS is not None:
            self.valid_BS = change(self.valid_BS)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by ``indices`` (numbers or a mask)."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self.valid_BS, self.columns = None, 0

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)
