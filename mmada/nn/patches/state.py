"""What byte patches keep between forward passes.

The layers over bytes, the stack over patches and the entropy model each have a cache of their own, since they count
different tokens. Beside them stand the last bytes, of which the unfinished patch and the next n-grams are made, and
the last output of the stack, which bytes look at until another patch is finished.

# B rows, S kept entries, T new ones
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmada.nn.cache import MMaDACache, joined_inside
from mmada.nn.cache_join import JoinPlan, take_rows


class Trail:
    """The last entries of every row, tensors (B, S, ...) by name; the newest of each row in the last column.

    ``counts_B``: entries that each row has; what stands before them means nothing.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}
        self.counts_B: Tensor | None = None

    def last(self, name: str, count: int) -> Tensor | None:
        """The last ``count`` columns, (B, count, ...), zeros in front where there are fewer; None before the first."""
        if name not in self.entries:
            return None
        kept = self.entries[name]
        short = count - kept.shape[1]
        if short > 0:
            kept = torch.cat([kept.new_zeros(kept.shape[0], short, *kept.shape[2:]), kept], dim=1)
        return kept[:, kept.shape[1] - count :]

    def append(self, entries: dict[str, Tensor], counts_B: Tensor | None) -> None:
        """Add (B, T, ...) by name, of which row i's first ``counts_B[i]`` are real; None: all."""
        first = next(iter(entries.values()))
        if self.counts_B is None:
            self.entries = dict(entries)
            self.counts_B = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)
        else:
            self.entries = {name: torch.cat([kept, entries[name]], dim=1) for name, kept in self.entries.items()}
        if counts_B is not None:
            self._shift(first.shape[1] - counts_B)
        self.counts_B = self.counts_B + (first.shape[1] if counts_B is None else counts_B)

    def drop(self, removed_B: Tensor) -> None:
        """Forget the newest ``removed_B`` entries of each row."""
        if self.counts_B is not None:
            if bool(removed_B.any()):
                self._shift(removed_B)
            self.counts_B = self.counts_B - removed_B

    def trim(self, count: int) -> None:
        """Forget all but the newest ``count`` entries of each row."""
        if self.counts_B is not None:
            self.entries = {
                name: kept[:, max(0, kept.shape[1] - count) :].clone() for name, kept in self.entries.items()
            }
            self.counts_B = self.counts_B.clamp(max=count)

    def _shift(self, columns_B: Tensor) -> None:
        """Move the entries of each row to the right; what leaves there is gone."""
        width = next(iter(self.entries.values())).shape[1]
        source_BS = (torch.arange(width, device=columns_B.device) - columns_B[:, None]).clamp(min=0)
        rows_B1 = torch.arange(source_BS.shape[0], device=columns_B.device)[:, None]
        self.entries = {name: kept[rows_B1, source_BS] for name, kept in self.entries.items()}

    def tensors(self) -> list[Tensor]:
        return [*self.entries.values()] + ([] if self.counts_B is None else [self.counts_B])

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.entries = {name: change(kept) for name, kept in self.entries.items()}
        self.counts_B = None if self.counts_B is None else change(self.counts_B)

    def reset(self) -> None:
        self.entries, self.counts_B = {}, None

    @staticmethod
    def joined(pieces: Sequence[tuple[Trail, Tensor]], plan: JoinPlan) -> Trail:
        """The rows of several as one."""
        joint = Trail()
        width = max(entries.shape[1] for trail, _ in pieces for entries in trail.entries.values())
        joint.entries = {
            name: plan.arranged(torch.cat([take_rows(trail.last(name, width), rows_N) for trail, rows_N in pieces]))
            for name in pieces[0][0].entries
        }
        joint.counts_B = plan.arranged(torch.cat([take_rows(trail.counts_B, rows_N) for trail, rows_N in pieces]))
        return joint


class PatchState:
    """One part of an ``MMaDACache``: everything that byte patches keep.

    ``bytes``: id, reading, whether a patch ended, and the encoder's state of the last bytes; ``outputs``: the stack's
    last outputs; ``local``, ``stack``, ``entropy``: the caches of the layers over bytes, of the stack over patches
    and of the entropy model.
    """

    def __init__(self, num_local: int, num_stack: int, num_entropy: int, num_ids: int) -> None:
        """Numbers of layers, 0 for no entropy model; ``num_ids``: bytes before the next one that its n-grams reach."""
        self.num_ids = num_ids
        self.bytes, self.outputs = Trail(), Trail()
        self.local, self.stack = MMaDACache(num_local), MMaDACache(num_stack)
        self.entropy = MMaDACache(num_entropy) if num_entropy else None
        self._settled_B: Tensor | None = None  # bytes on the trail that cannot be taken back
        self._recording = False

    @property
    def caches(self) -> list[MMaDACache]:
        """Those that there are."""
        return [cache for cache in (self.local, self.stack, self.entropy) if cache is not None]

    @property
    def recording(self) -> bool:
        """Whether what ``crop`` needs is kept."""
        return self._recording

    @recording.setter
    def recording(self, on: bool) -> None:
        if on and not self._recording:
            for cache in self.caches:
                cache.activate_past_recording()
        self._recording = on

    def open_B(self) -> Tensor | None:
        """Bytes of each row's unfinished patch; None before the first byte."""
        if self.bytes.counts_B is None:
            return None
        ends_BS = self.bytes.entries["end"]
        column_S = torch.arange(ends_BS.shape[1], device=ends_BS.device)
        first_B = ends_BS.shape[1] - self.bytes.counts_B
        is_end_BS = ends_BS & (column_S >= first_B[:, None])
        last_end_B = torch.where(is_end_BS, column_S, first_B[:, None] - 1).amax(dim=1)
        return ends_BS.shape[1] - 1 - last_end_B

    def settle(self) -> None:
        """Forget what no later byte needs: nothing that was read so far can be taken back."""
        open_B = self.open_B()
        if open_B is not None:
            self.bytes.trim(max(1, self.num_ids, int(open_B.max())))
            self.outputs.trim(1)
            self._settled_B = self.bytes.counts_B

    def check_crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Raise ValueError where ``crop`` would."""
        counts_B = self.bytes.counts_B
        if counts_B is None:
            return
        removed_B, patches_B = self._removed(counts_B, removed)
        settled_B = 0 if self._settled_B is None else self._settled_B
        most = int(removed_B.max())
        if most and bool((counts_B - removed_B < settled_B).any()):
            raise ValueError(
                f"crop({-most}) takes back bytes that byte patches have not recorded; call activate_past_recording() "
                "on the cache before the bytes that may be taken back"
            )
        for cache in self.caches:
            cache.check_crop_rows(patches_B if cache is self.stack else removed_B)

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` bytes of each row back, and the outputs for patches that they finished."""
        counts_B = self.bytes.counts_B
        if counts_B is None:
            return
        removed_B, patches_B = self._removed(counts_B, removed)
        self.bytes.drop(removed_B)
        self.outputs.drop(patches_B)
        for cache in self.caches:
            cache.crop_rows(patches_B if cache is self.stack else removed_B)
        self.settle()

    def _removed(self, counts_B: Tensor, removed: Tensor | int) -> tuple[Tensor, Tensor]:
        """Bytes and patches to take back in each row."""
        removed_B = torch.as_tensor(removed, device=counts_B.device).expand_as(counts_B)
        ends_BS = self.bytes.entries["end"]
        from_the_end_S = torch.arange(ends_BS.shape[1], 0, -1, device=ends_BS.device)
        return removed_B, (ends_BS & (from_the_end_S <= removed_B[:, None])).sum(dim=1)

    def tensors(self) -> list[Tensor]:
        kept = [*self.bytes.tensors(), *self.outputs.tensors()]
        kept += [] if self._settled_B is None else [self._settled_B]
        return kept + [each for cache in self.caches for layer in cache.layers for each in layer.tensors()]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        for trail in (self.bytes, self.outputs):
            trail.map(change)
        for cache in self.caches:
            cache.map(change)
        self._settled_B = None if self._settled_B is None else change(self._settled_B)

    def reset(self) -> None:
        for trail in (self.bytes, self.outputs):
            trail.reset()
        for cache in self.caches:
            cache.reset()
        self._settled_B = None

    def joined(self, pieces: Sequence[tuple[PatchState, Tensor]], plan: JoinPlan) -> PatchState:
        """The rows of several as one, see ``MMaDACache.joined``."""
        joint = PatchState(0, 0, 0, self.num_ids)
        joint.bytes = Trail.joined([(state.bytes, rows_N) for state, rows_N in pieces], plan)
        joint.outputs = Trail.joined([(state.outputs, rows_N) for state, rows_N in pieces], plan)
        for name in ("local", "stack", "entropy"):
            caches = [(getattr(state, name), rows_N) for state, rows_N in pieces]
            setattr(joint, name, None if caches[0][0] is None else joined_inside(caches, plan))
        joint.settle()
        return joint
