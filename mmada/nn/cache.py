"""What a model keeps between forward passes: one cache for any mixture of layers.

A layer's mixer owns its state: it asks ``cache.layers[layer_idx]`` for the parts that it needs, by name, and each
part knows how to grow, to be reordered, cut back and measured. Keys and values are one kind of part, everything that
is carried from token to token (convolution inputs, state spaces, memories) the other.

# B batch, T new tokens, S columns so far, N rows of a cache
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmada.nn.cache_join import JoinPlan, fewest_moves, numbers, take_rows
from mmada.nn.cache_parts import KeyValues, Recurrent, Scan, State, count_range

__all__ = ["KeyValues", "LayerState", "MMaDACache", "Recurrent", "Scan", "State", "checked_cache"]


class LayerState(CacheLayerMixin):
    """The parts of one layer's state, made when they are first asked for."""

    supports_early_init = False  # only a mixer knows its parts

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {}
        self.record_past = False
        self.spare_columns = 0

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name; ``make()`` the first time."""
        if name not in self.parts:
            self.parts[name] = make()
            self.parts[name].recording = self.record_past
        return self.parts[name]

    def key_values(self, name: str = "key_values", window: int | None = None) -> KeyValues:
        """Keys and values under ``name``; ``window`` counts at the first call."""
        return self.part(name, lambda: KeyValues(window, self.spare_columns))

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

    def joined(self, pieces: Sequence[tuple[LayerState, Tensor]], plan: JoinPlan) -> LayerState:
        """The named rows of several layers' states as one."""
        joint = LayerState()
        joint.spare_columns = plan.spare_columns
        known = {name: part for state, _ in pieces for name, part in state.parts.items()}
        for name, part in known.items():
            joint.parts[name] = part.joined([(state.parts.get(name), rows_N) for state, rows_N in pieces], plan)
        return joint

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
    ``valid_BS`` says which columns were real, None where all were. ``is_packed``: rows hold several documents, which
    do not see each other; such a cache can neither grow nor be cut, as no layer keeps where they begin.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])
        self._counts: tuple[Tensor, int, int] | None = None
        self.valid_BS = None
        self.columns = 0
        self.is_packed = False

    @property
    def valid_BS(self) -> Tensor | None:
        """Which columns were real; None where all were."""
        return self._valid_BS

    @valid_BS.setter
    def valid_BS(self, valid_BS: Tensor | None) -> None:
        self._valid_BS, self._counts = valid_BS, None

    @property
    def lengths_B(self) -> Tensor | None:
        """Real tokens per row, or None where all columns are real."""
        return None if self.valid_BS is None else self._counted()[0]

    @property
    def past_range(self) -> tuple[int, int]:
        """Real tokens of the shortest and of the longest row."""
        return (self.columns, self.columns) if self.valid_BS is None else self._counted()[1:]

    def _counted(self) -> tuple[Tensor, int, int]:
        """Real tokens per row, the fewest and the most; counted once, as reading a number waits for the device."""
        if self._counts is None:
            lengths_B = self.valid_BS.sum(dim=1)
            self._counts = (lengths_B, *count_range(lengths_B))
        return self._counts

    def advance(self, columns: int, valid_BT: Tensor | None) -> None:
        """Count ``columns`` new ones, after all layers have taken them; ``valid_BT`` None means all are real."""
        if self.valid_BS is None and valid_BT is not None:
            self.valid_BS = valid_BT.new_ones(valid_BT.shape[0], self.columns)
        if self.valid_BS is not None:
            counts = self._counts if valid_BT is None else None
            new = self.valid_BS.new_ones(self.valid_BS.shape[0], columns) if valid_BT is None else valid_BT
            self.valid_BS = torch.cat([self.valid_BS, new], dim=1)
            if counts is not None:
                lengths_B, shortest, longest = counts
                self._counts = (lengths_B + columns, shortest + columns, longest + columns)
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
        self.refuse_packed()
        columns = self.columns + tokens_to_remove
        removed: Tensor | int = -tokens_to_remove
        totals: Tensor | int = columns
        valid_BS = self.valid_BS
        if valid_BS is not None:
            removed, valid_BS = valid_BS[:, columns:].sum(dim=1), valid_BS[:, :columns]
            totals = valid_BS.sum(dim=1)
        self._crop_parts(totals, removed)
        self.columns, self.valid_BS = columns, valid_BS

    def refuse_packed(self) -> None:
        """Raise ValueError where rows hold several documents."""
        if self.is_packed:
            raise ValueError("past_key_values holds rows of several documents; give each document a row of its own")

    def check_crop_rows(self, removed_B: Tensor) -> None:
        """Raise ValueError where ``crop_rows`` would."""
        for part in self._parts():
            part.check_crop(self._totals_B(removed_B) - removed_B, removed_B)

    def crop_rows(self, removed_B: Tensor) -> None:
        """Take the last ``removed_B`` (B,) real tokens of each row back; what is left counts as if without padding in
        front. For caches inside a part, whose rows need not agree on what a column of the caller's was."""
        totals_B = self._totals_B(removed_B) - removed_B
        self._crop_parts(totals_B, removed_B)
        self.columns = int(totals_B.max())
        valid_BS = torch.arange(self.columns, device=totals_B.device) < totals_B[:, None]
        self.valid_BS = None if bool(valid_BS.all()) else valid_BS

    def _totals_B(self, like_B: Tensor) -> Tensor:
        return torch.full_like(like_B, self.columns) if self.valid_BS is None else self.valid_BS.sum(dim=1)

    def _parts(self) -> list[Any]:
        return [part for layer in self.layers for part in layer.parts.values()]

    def _crop_parts(self, totals: Tensor | int, removed: Tensor | int) -> None:
        for part in self._parts():  # first, so that a crop that is refused changes nothing
            part.check_crop(totals, removed)
        for part in self._parts():
            part.crop(totals, removed)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, batch first, by ``change`` of it."""
        for layer in self.layers:
            layer.map(change)
        if self.valid_BS is not None:
            self.valid_BS = change(self.valid_BS)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self.map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named by ``indices`` (numbers or a mask)."""
        self.map(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.reset()
        self.valid_BS, self.columns, self.is_packed = None, 0, False

    @staticmethod
    def joined(sources: Sequence[tuple[MMaDACache, Tensor]], spare_columns: int = 0) -> MMaDACache:
        """A new cache with rows of several: of each source those named, (N,) numbers, which may come more than once.

        Decoding goes on from each row as from where it was. Columns count anew, as if without padding in front, and
        those that none of the rows needs are left out. The sources stay as they are. ``spare_columns``: tokens that
        keys and values have room for; decoding without gradients then writes into it instead of copying them.
        Raises ValueError for rows of several documents, and while what was fed may still be taken back.
        """
        sources = [(cache, rows_N) for cache, rows_N in sources if len(rows_N)]
        if not sources:
            raise ValueError("there is no row to join; name at least one")
        return _join(sources, spare_columns)

    def refilled(
        self, kept: Sequence[int], sources: Sequence[tuple[MMaDACache, Tensor]], spare_columns: int = 0
    ) -> tuple[MMaDACache, list[int]]:
        """As ``joined([(self, kept), *sources])``, in whatever order copies least; and the row that is at each place.

        ``kept``: ascending, at least one. This cache is used up: what goes on may go on in its room.
        """
        order, moved = fewest_moves(kept, sum(len(rows_N) for _, rows_N in sources))
        rows_N = torch.tensor(kept, device=self.device)
        cache = _join(
            [(self, rows_N), *((cache, rows) for cache, rows in sources if len(rows))],
            spare_columns,
            numbers(order, rows_N),
            (numbers([row for row, _ in moved], rows_N), numbers([place for _, place in moved], rows_N)),
        )
        return cache, order

    @property
    def device(self) -> torch.device:
        """Where what is kept of the first layer is; the CPU before the first forward pass."""
        return next((tensor.device for layer in self.layers for tensor in layer.tensors()), torch.device("cpu"))

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)


def _join(
    sources: Sequence[tuple[MMaDACache, Tensor]],
    spare_columns: int,
    order_N: Tensor | None = None,
    moved: tuple[Tensor, Tensor] | None = None,
) -> MMaDACache:
    """See ``JoinPlan``."""
    for cache, _ in sources:
        cache.refuse_packed()
        if any(layer.record_past for layer in cache.layers):
            raise ValueError("a cache that records what may be taken back cannot be joined; join before recording")
    totals = []
    for cache, rows_N in sources:
        lengths_B = cache.lengths_B
        totals.append(torch.full_like(rows_N, cache.columns) if lengths_B is None else take_rows(lengths_B, rows_N))
    totals_N = torch.cat(totals)
    plan = JoinPlan(*count_range(totals_N), spare_columns, order_N, moved)
    joint = MMaDACache(len(sources[0][0].layers))
    for index, layer in enumerate(sources[0][0].layers):
        joint.layers[index] = layer.joined([(cache.layers[index], rows_N) for cache, rows_N in sources], plan)
    joint.columns = plan.longest
    if plan.shortest < plan.longest:
        totals_N = plan.arranged(totals_N)
        joint.valid_BS = torch.arange(plan.longest, device=totals_N.device) < totals_N[:, None]
        joint._counts = (totals_N, plan.shortest, plan.longest)
    return joint


def joined_inside(pieces: Sequence[tuple[MMaDACache, Tensor]], plan: JoinPlan) -> MMaDACache:
    """Caches inside a part, whose rows count other tokens, joined and arranged as the part is."""
    return _join(pieces, plan.spare_columns, plan.order_N, plan.moved)


def checked_cache(past_key_values: Any) -> MMaDACache:
    """The cache as it is. Raises ValueError for one of another kind."""
    if not isinstance(past_key_values, MMaDACache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, which cannot hold every kind of layer; "
            "leave it out, or give an MMaDACache(config.num_hidden_layers)"
        )
    return past_key_values
