"""What a model keeps between forward passes: one cache for any mixture of layers.

A layer's mixer owns its state: it asks ``cache.layers[layer_idx]`` for the parts that it needs, by name, and each
part knows how to grow, to be reordered, cut back and measured. Keys and values are one kind of part, everything that
is carried from token to token (convolution inputs, state spaces, memories) the other.

# B batch, T new tokens, S columns so far
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmada.nn.cache_parts import KeyValues, Recurrent, Scan, State

__all__ = ["KeyValues", "LayerState", "MMaDACache", "Recurrent", "Scan", "State", "checked_cache"]


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
    ``valid_BS`` says which columns were real, None where all were. ``is_packed``: rows hold several documents, which
    do not see each other; such a cache can neither grow nor be cut, as no layer keeps where they begin.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[LayerState() for _ in range(num_layers)])
        self.valid_BS: Tensor | None = None
        self.columns = 0
        self.is_packed = False

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

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward pass."""
        return next((tensor.shape[0] for layer in self.layers for tensor in layer.tensors()), -1)


def checked_cache(past_key_values: Any) -> MMaDACache:
    """The cache as it is. Raises ValueError for one of another kind."""
    if not isinstance(past_key_values, MMaDACache):
        raise ValueError(
            f"past_key_values is a {type(past_key_values).__name__}, which cannot hold every kind of layer; "
            "leave it out, or give an MMaDACache(config.num_hidden_layers)"
        )
    return past_key_values
