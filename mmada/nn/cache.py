"""What a model keeps between forward passes: one cache for any mixture of layers.

A layer's mixer owns its state: it asks ``cache.layers[layer_idx]`` for the parts that it needs, by name, and each
part knows how to grow, to be reordered, cut back and measured. Keys and values are one kind of part, everything that
is carried from token to token (convolution inputs, state spaces, memories) the other.

# B batch, T new tokens, S kept tokens, G key/value heads, K head width, D model
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmada.nn.context import Context, front_order, take_columns

State = dict[str, Tensor]
Scan = Callable[[Tensor, State | None, Context], tuple[Tensor, State]]


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
            self._trim(context.totals_B() if context.is_ragged else context.past + context.shape[1])
        return keys, values, offset

    def _joined(self, old: Tensor | None, new: Tensor, context: Context) -> Tensor:
        if not context.is_ragged:
            return new if old is None else torch.cat([old, new], dim=2)
        batch, length = context.shape
        column_BT = context.index_BT().expand(batch, length) - self.offset
        width = int(context.totals_B().max()) - self.offset
        valid_BT = context.valid_BT()
        if valid_BT is not None:
            column_BT = torch.where(valid_BT, column_BT, width)  # padding goes to a column that is cut off
        kept = new.new_zeros(*new.shape[:2], width + 1, new.shape[3])
        if old is not None:
            kept[:, :, : min(width, old.shape[2])] = old[:, :, :width]
        index = column_BT[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        return kept.scatter(2, index, new)[:, :, :width]

    def _trim(self, totals: Tensor | int) -> None:
        """Forget what no later token can see; ``totals``: real tokens of the rows."""
        if self.window is None or self.keys is None:
            return
        shortest = totals if isinstance(totals, int) else int(totals.min())
        surplus = shortest - self.offset - self.window
        if surplus > 0:
            self.offset += surplus
            self.keys, self.values = self.keys[:, :, surplus:].clone(), self.values[:, :, surplus:].clone()

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` tokens of each row back, so that ``totals`` are left."""
        if self.keys is None:
            return
        left = totals if isinstance(totals, int) else int(totals.max())
        shortest = totals if isinstance(totals, int) else int(totals.min())
        most_removed = removed if isinstance(removed, int) else int(removed.max())
        if most_removed and self.offset > 0 and shortest - self.window < self.offset and not self.recording:
            raise ValueError(
                f"crop({-most_removed}) reaches behind a window of {self.window} that has moved on; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        self.keys, self.values = (kept[:, :, : left - self.offset] for kept in (self.keys, self.values))
        self._trim(totals)

    def tensors(self) -> list[Tensor]:
        return [] if self.keys is None else [self.keys, self.values]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values = change(self.keys), change(self.values)

    def reset(self) -> None:
        self.keys = self.values = None
        self.offset = 0


class Recurrent:
    """Tensors (B, ...) that a recurrence carries on, by name.

    While recording it also keeps the inputs since the last ``crop``, so that tokens can be taken back: the state
    from before them is put back and what remains of them is run again at the next call.
    """

    def __init__(self) -> None:
        self.state: State | None = None
        self.recording = False
        self._base: State | None = None
        self._pending: list[tuple[Tensor, Tensor]] = []  # inputs (B, T, D) and which of them are real (B, T)
        self._replay: tuple[Tensor, Tensor] | None = None  # inputs (B, T, D) and their lengths (B,)

    def run(self, scan: Scan, hidden_BTD: Tensor, context: Context) -> Tensor:
        """``scan(hidden_BTD, state, context) -> (output, new state)`` from the kept state on; keeps the new one.

        The scan may read ``lengths_B`` and ``past`` of its context. Returns the output.
        """
        state = self._caught_up(scan, context)
        output, self.state = scan(hidden_BTD, state, context)
        if self.recording:
            if not self._pending:
                self._base = state
            valid_BT = context.valid_BT()
            if valid_BT is None:
                valid_BT = torch.ones(context.shape, dtype=torch.bool, device=context.device)
            self._pending.append((hidden_BTD, valid_BT))
        return output

    def _caught_up(self, scan: Scan, context: Context) -> State | None:
        if self._replay is None:
            return self.state
        hidden_BTD, lengths_B = self._replay
        self._replay = None
        past_B = torch.full_like(lengths_B, context.past) if context.past_B is None else context.past_B
        past_B = past_B - lengths_B
        again = Context(
            shape=hidden_BTD.shape[:2],
            device=context.device,
            position_ids_BT=past_B[:, None] + torch.arange(hidden_BTD.shape[1], device=context.device),
            lengths_B=lengths_B,
            past=int(past_B.max()),
            past_B=past_B,
        )
        return scan(hidden_BTD, self.state, again)[1]

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` real tokens of each row back."""
        if self.state is None:
            return
        most_removed = removed if isinstance(removed, int) else int(removed.max())
        if most_removed == 0:
            self._pending, self._base = [], None
            return
        if not self._pending:
            raise ValueError(
                f"crop({-most_removed}) takes back tokens that a recurrent layer has not recorded; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        hidden_BTD = torch.cat([hidden for hidden, _ in self._pending], dim=1)
        valid_BT = torch.cat([valid for _, valid in self._pending], dim=1)
        order_BT = front_order(valid_BT)
        if order_BT is not None:
            hidden_BTD = take_columns(hidden_BTD, order_BT)
        lengths_B = valid_BT.sum(dim=1) - removed
        if int(lengths_B.min()) < 0:
            raise ValueError(f"crop({-most_removed}) takes back more tokens than were recorded since the last crop")
        longest = int(lengths_B.max())
        self.state = self._base
        self._replay = (hidden_BTD[:, :longest], lengths_B) if longest else None
        self._pending, self._base = [], None

    def tensors(self) -> list[Tensor]:
        kept = [*(self.state or {}).values(), *(self._base or {}).values()]
        kept += [tensor for pair in self._pending for tensor in pair]
        return kept + list(self._replay or ())

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        def changed(state: State | None) -> State | None:
            return None if state is None else {name: change(tensor) for name, tensor in state.items()}

        self.state, self._base = changed(self.state), changed(self._base)
        self._pending = [(change(hidden), change(valid)) for hidden, valid in self._pending]
        self._replay = self._replay and (change(self._replay[0]), change(self._replay[1]))

    def reset(self) -> None:
        self.state = self._base = self._replay = None
        self._pending = []


class LayerState(CacheLayerMixin):
    """The parts of one layer's state, made when they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}
        self.recording = False

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name; ``make()`` the first time."""
        if name not in self.parts:
            self.parts[name] = make()
            self.parts[name].recording = self.recording
        return self.parts[name]

    def key_values(self, name: str = "key_values", window: int | None = None) -> KeyValues:
        """Keys and values under ``name``; ``window`` counts at the first call."""
        return self.part(name, lambda: KeyValues(window))

    def recurrent(self, name: str) -> Recurrent:
        """The recurrent state under ``name``."""
        return self.part(name, Recurrent)

    def record(self, on: bool) -> None:
        self.recording = on
        for part in self.parts.values():
            part.recording = on

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
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])
        self._valid_BS: Tensor | None = None  # which columns were real; None: all
        self.columns = 0
        self.recording = False

    @property
    def lengths_B(self) -> Tensor | None:
        """Real tokens per row, or None where all columns are real."""
        return None if self._valid_BS is None else self._valid_BS.sum(dim=1)

    def advance(self, columns: int, valid_BT: Tensor | None) -> None:
        """Count ``columns`` new ones, after all layers have taken them; ``valid_BT`` None means all are real."""
        if self._valid_BS is None and valid_BT is not None:
            self._valid_BS = valid_BT.new_ones(valid_BT.shape[0], self.columns)
        if self._valid_BS is not None:
            new = self._valid_BS.new_ones(self._valid_BS.shape[0], columns) if valid_BT is None else valid_BT
            self._valid_BS = torch.cat([self._valid_BS, new], dim=1)
        self.columns += columns

    def num_bytes(self) -> int:
        """Bytes of all tensors that are kept."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer.tensors())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, padding included, the same for all layers."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def activate_past_recording(self) -> None:
        """From now on keep what ``crop`` needs to take tokens back, until the next ``crop``."""
        self.recording = True
        for layer in self.layers:
            layer.record(True)

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` can take back any token from now on: once past recording is on."""
        return self.recording

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last columns back, as many as the negative number says; 0 only forgets what was recorded.

        Raises ValueError where a layer no longer has what that needs.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is positive; give the columns to remove as a negative number")
        if -tokens_to_remove > self.columns:
            raise ValueError(f"crop({tokens_to_remove}) removes more than the {self.columns} columns that there are")
        self.columns += tokens_to_remove
        removed: Tensor | int = -tokens_to_remove
        totals: Tensor | int = self.columns
        if self._valid_BS is not None:
            removed = self._valid_BS[:, self.columns :].sum(dim=1)
            self._valid_BS = self._valid_BS[:, : self.columns]
            totals = self._valid_BS.sum(dim=1)
        for layer in self.layers:
            for part in layer.parts.values():
                part.crop(totals, removed)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.map(change)
        if self._valid_BS is not None:
            self._valid_BS = change(self._valid_BS)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by ``indices`` (numbers or a mask)."""
        self._map(lambda tensor: tensor[indices])

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self._valid_BS, self.columns = None, 0

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)
