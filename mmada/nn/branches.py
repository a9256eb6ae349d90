"""A branch of a layer that only some of a row's tokens go through; for the others it is not computed.

To the layers inside, the tokens that come are all there are: they stand at the front of the row, one after the other,
and are counted from the branch's first token. Windows and distances of attention in a branch thus count tokens of
the branch; rotary angles stay those of the positions in the row.

# B batch, T tokens, R columns of the branch: the most tokens that any row sends there, D model
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmada.nn.cache import LayerState
from mmada.nn.cache_join import JoinPlan, Pieces, take_rows
from mmada.nn.cache_parts import count_range
from mmada.nn.context import Context, take_columns


class BranchState:
    """The state of a branch, a part of its layer's: those of the layers inside, and how many tokens came to it.

    To the layers inside it stands in for the cache: they ask ``layers[layer_idx]`` for their parts.
    """

    def __init__(self, layer_idx: int) -> None:
        self._inside = LayerState()
        self.layers = {layer_idx: self._inside}
        self.past_B: Tensor | None = None
        # While recording, since the last crop: which tokens of the row came here, and which were real; (B, T) each.
        self._recorded: list[tuple[Tensor, Tensor]] = []

    @property
    def recording(self) -> bool:
        return self._inside.record_past

    @recording.setter
    def recording(self, on: bool) -> None:
        if on:
            self._inside.activate_past_recording()

    def advance(self, takes_BT: Tensor, context: Context) -> None:
        """Count the tokens that came, after the layers inside have taken them. Every pass counts, without any, too."""
        counts_B = takes_BT.sum(dim=1)
        self.past_B = counts_B if self.past_B is None else self.past_B + counts_B
        if self.recording:
            valid_BT = context.valid_BT()
            self._recorded.append((takes_BT, torch.ones_like(takes_BT) if valid_BT is None else valid_BT))

    def check_crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Raise ValueError where ``crop`` would need what is no longer kept."""
        if self.past_B is None:
            return
        removed_B = torch.zeros_like(self.past_B) + removed
        recorded_B = sum((valid_BT.sum(dim=1) for _, valid_BT in self._recorded), start=torch.zeros_like(removed_B))
        if bool((removed_B > recorded_B).any()):
            raise ValueError(
                f"crop({-int(removed_B.max())}) takes back tokens whose branch was not recorded; call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        came_B = self._came(removed)
        for part in self._inside.parts.values():
            part.check_crop(self.past_B - came_B, came_B)

    def crop(self, totals: Tensor | int, removed: Tensor | int) -> None:
        """Take the last ``removed`` tokens of each row back: from here those of them that came."""
        if self.past_B is None:
            return
        came_B = self._came(removed)
        self.past_B = self.past_B - came_B
        for part in self._inside.parts.values():
            part.crop(self.past_B, came_B)
        self._recorded = []

    def _came(self, removed: Tensor | int) -> Tensor:
        """How many of the last ``removed`` tokens of each row came here, (B,)."""
        assert self.past_B is not None
        came_B, later_B = torch.zeros_like(self.past_B), torch.zeros_like(self.past_B)
        for takes_BT, valid_BT in reversed(self._recorded):
            # Real tokens from this column on, those of later passes included.
            from_here_BT = valid_BT.flip(1).cumsum(dim=1).flip(1) + later_B[:, None]
            is_removed_BT = from_here_BT <= (removed if isinstance(removed, int) else removed[:, None])
            came_B = came_B + (takes_BT & is_removed_BT).sum(dim=1)
            later_B = later_B + valid_BT.sum(dim=1)
        return came_B

    def tensors(self) -> list[Tensor]:
        kept = self._inside.tensors() + [tensor for pair in self._recorded for tensor in pair]
        return kept if self.past_B is None else [self.past_B, *kept]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._inside.map(change)
        self._recorded = [(change(takes_BT), change(valid_BT)) for takes_BT, valid_BT in self._recorded]
        if self.past_B is not None:
            self.past_B = change(self.past_B)

    def reset(self) -> None:
        self._inside.reset()
        self.past_B, self._recorded = None, []

    def joined(self, pieces: Pieces, plan: JoinPlan) -> BranchState:
        """The rows of several as one, see ``MMaDACache.joined``."""
        (layer_idx,) = self.layers
        joint = BranchState(layer_idx)
        pasts = [
            rows_N.new_zeros(len(rows_N)) if part is None or part.past_B is None else take_rows(part.past_B, rows_N)
            for part, rows_N in pieces
        ]
        shortest, longest = count_range(past_N := torch.cat(pasts))
        joint.past_B = plan.arranged(past_N)
        inside = [(LayerState() if part is None else part._inside, rows_N) for part, rows_N in pieces]
        own_plan = replace(plan, shortest=shortest, longest=longest)
        joint._inside = joint.layers[layer_idx] = self._inside.joined(inside, own_plan)
        return joint


Mixer = Callable[[Tensor, Context, Any], tuple[Tensor, Tensor | None]]


def run_branch(
    mixer: Mixer,
    hidden_BTD: Tensor,
    takes_BT: Tensor,
    context: Context,
    state: BranchState | None = None,
    always: bool = False,
) -> Tensor:
    """``mixer(hidden, context, state)`` over the tokens that the branch takes, (B, T, D), 0 for all others.

    ``takes_BT``: real tokens only. Where it is False everywhere the mixer is not called at all, or with ``always``
    on one column, whose output and gradients are 0.
    """
    inside, order_BR = branch_context(context, takes_BT, state)
    if order_BR.shape[1] > 0:
        output_BRD, _ = mixer(take_columns(hidden_BTD, order_BR), inside, state)
    if state is not None:
        state.advance(takes_BT, context)
    if order_BR.shape[1] == 0:
        if not always:
            return torch.zeros_like(hidden_BTD)
        output_BRD, _ = mixer(hidden_BTD[:, :1], first_column(context), None)
    came_BT = takes_BT.cumsum(dim=1)
    back_BTD = take_columns(output_BRD, (came_BT - 1).clamp(min=0))
    return torch.where(takes_BT[..., None], back_BTD, 0.0)


def branch_context(context: Context, takes_BT: Tensor, state: BranchState | None) -> tuple[Context, Tensor]:
    """What the layers of a branch are told of the tokens it takes, and the columns that those come from, (B, R)."""
    counts_B = takes_BT.sum(dim=1)
    past_B = None if state is None else state.past_B
    most_past = counts_B.new_zeros(()) if past_B is None else past_B.max()
    least, most, past = torch.stack([*counts_B.aminmax(), most_past]).tolist()  # one wait for the device
    order_BR = torch.argsort((~takes_BT).to(torch.uint8), dim=1, stable=True)[:, :most]
    inside = Context(
        shape=(len(counts_B), most),
        device=context.device,
        position_ids_BT=take_columns(context.position_ids_BT, order_BR),
        lengths_B=None if least == most else counts_B,
        past=past,
        past_B=past_B,
        documents_BT=None if context.documents_BT is None else take_columns(context.documents_BT, order_BR),
        rotary=None
        if context.rotary is None
        else (take_columns(context.rotary[0], order_BR), take_columns(context.rotary[1], order_BR)),
    )
    return inside, order_BR


def first_column(context: Context) -> Context:
    """The context as if the first column were all there is."""
    return Context(
        shape=(context.shape[0], 1),
        device=context.device,
        position_ids_BT=context.position_ids_BT[:, :1],
        rotary=None if context.rotary is None else (context.rotary[0][:, :1], context.rotary[1][:, :1]),
    )
