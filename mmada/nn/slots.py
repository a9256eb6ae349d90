"""A memory of slots that every sequence reads and writes: the rules of a neural Turing machine, in chunks.

Token t of a sequence, with query q, key k, erase vector e in (0, 1)^D and add vector a (all linear in its hidden
state), reads ``m = softmax(q Sᵀ/√D) S`` and then writes (arXiv:1410.5401, eqs. 2 to 4)

    w = softmax(k Sᵀ/√D),  M ← M ∘ (1 - w eᵀ) + w aᵀ

where M (N, D) are the slots now, and S the slots as they were when the token's chunk began: a chunk is
``memory_chunk_size`` tokens, counted from the sequence's first. So addresses and what is read move on from chunk to
chunk, while writes are made one after the other, in the tokens' order; the newest tokens, not yet read here, are what
attention beside the memory sees best. With chunks of one token this is the Turing machine's rule to the letter. A
sequence starts from the learned slots.

With allocation a token writes partly where least is lost: ``w ← α·u + (1 - α)·w``, α = σ(·) of its hidden state, u
the one-hot address of the slot least used when the chunk began; the second token of a chunk takes the slot
second-least used, and so on. Usage is ``0.95·usage + w`` (arXiv:1605.06065, eq. 20, of writes alone).

# B batch, T tokens, D model, N slots, C columns of a chunk, L chunks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache, State
from mmada.nn.context import Context, take_columns
from mmada.nn.observing import Moments, observe

USAGE_DECAY = 0.95


class Commands(NamedTuple):
    """What every token asks of the memory. ``allocation_BT1``: α; None without allocation."""

    query_BTD: Tensor
    key_BTD: Tensor
    erase_BTD: Tensor
    add_BTD: Tensor
    allocation_BT1: Tensor | None


@dataclass
class ChunkColumns:
    """Which chunk every token is of.

    ``position_BT``: the token's number in its sequence. ``valid_BT``: False where there is no token.
    ``column_BT``: its column where every chunk has a stretch of ``chunk_size`` columns, None where it stands there
        already; there are ``num_columns``.
    """

    chunk_size: int
    position_BT: Tensor
    valid_BT: Tensor
    column_BT: Tensor | None
    num_columns: int

    @classmethod
    def of(cls, context: Context, chunk_size: int) -> ChunkColumns:
        """The chunks of a forward pass; documents count their tokens each for itself."""
        batch, length = context.shape
        index_T = torch.arange(length, device=context.device)
        valid_BT = context.valid_BT()
        if valid_BT is None:
            valid_BT = torch.ones(batch, length, dtype=torch.bool, device=context.device)
        if context.documents_BT is None:
            position_BT = context.index_BT().expand(batch, length)
        else:
            starts_BT = F.pad(context.documents_BT[:, 1:] != context.documents_BT[:, :-1], (1, 0))
            position_BT = index_T - torch.where(starts_BT, index_T, 0).cummax(dim=1).values
        rows_agree = context.documents_BT is None and context.past_B is None
        if length == 1 or (rows_agree and context.past % chunk_size == 0):
            return cls(chunk_size, position_BT, valid_BT, None, length)
        opens_BT = (position_BT % chunk_size == 0) | (index_T == 0)
        first_BT = torch.where(opens_BT, index_T, 0).cummax(dim=1).values
        column_BT = (opens_BT.cumsum(dim=1) - 1) * chunk_size + index_T - first_BT
        return cls(chunk_size, position_BT, valid_BT, column_BT, int(column_BT[:, -1].max()) + 1)

    def arrange(self, values: Tensor) -> Tensor:
        """(B, T, ...) to (B, num_columns, ...), 0 where no token stands."""
        if self.column_BT is None:
            return values
        spread = values.new_zeros(values.shape[0], self.num_columns, *values.shape[2:])
        index = self.column_BT.view(*self.column_BT.shape, *[1] * (values.dim() - 2))
        return spread.scatter(1, index.expand_as(values), values)

    def restore(self, values: Tensor) -> Tensor:
        """(B, num_columns, ...) to (B, T, ...)."""
        return values if self.column_BT is None else take_columns(values, self.column_BT)


def initial_state(initial_ND: Tensor, batch: int, with_usage: bool) -> State:
    """The memory before any token: slots now and when the last chunk began; usage, for allocation, likewise."""
    slots_BND = initial_ND.expand(batch, -1, -1)
    state = {"slots": slots_BND, "slots_at_start": slots_BND}
    if with_usage:
        state["usage"] = state["usage_at_start"] = torch.zeros_like(slots_BND[..., :1])
    return state


def opened(state: State, initial_ND: Tensor, position_B: Tensor, valid_B: Tensor, chunk_size: int) -> State:
    """The state as tokens at these positions find it: they may open a chunk, and with it a sequence."""
    opens_B11 = (valid_B & (position_B % chunk_size == 0))[:, None, None]
    fresh_B11 = (valid_B & (position_B == 0))[:, None, None]
    found = {}
    for name, initial in (("slots", initial_ND), ("usage", 0.0)):
        if name in state:
            found[name] = torch.where(fresh_B11, initial, state[name])
            found[f"{name}_at_start"] = torch.where(opens_B11, found[name], state[f"{name}_at_start"])
    return found


def attend_slots(query_BTD: Tensor, slots_BND: Tensor) -> Tensor:
    """softmax(q Sᵀ/√D), (B, T, N)."""
    return (query_BTD @ slots_BND.mT * slots_BND.shape[-1] ** -0.5).softmax(dim=-1)


def write_weights(commands: Commands, state: State, rank_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Where tokens of one chunk write, (B, T, N); 0 where there is no token. ``rank_BT``: their place in the chunk."""
    weights_BTN = attend_slots(commands.key_BTD, state["slots_at_start"])
    if commands.allocation_BT1 is not None:
        slots = weights_BTN.shape[-1]
        order_BN = state["usage_at_start"].squeeze(-1).argsort(dim=-1, stable=True)
        address_BTN = F.one_hot(order_BN.gather(1, rank_BT % slots), slots).to(weights_BTN.dtype)
        weights_BTN = torch.lerp(weights_BTN, address_BTN, commands.allocation_BT1)
    return weights_BTN * valid_BT[..., None]


def slot_memory_reference(
    commands: Commands, chunks: ChunkColumns, initial_ND: Tensor, state: State
) -> tuple[Tensor, Tensor, State]:
    """Token by token. Returns what is read (B, T, D), the weights of reading (B, T, N) and the new state."""
    reads, weights = [], []
    for t in range(chunks.position_BT.shape[1]):
        token = Commands(*(None if part is None else part[:, t : t + 1] for part in commands))
        position_B, valid_B = chunks.position_BT[:, t], chunks.valid_BT[:, t]
        state = opened(state, initial_ND, position_B, valid_B, chunks.chunk_size)
        weights.append(attend_slots(token.query_BTD, state["slots_at_start"]))
        reads.append(weights[-1] @ state["slots_at_start"])
        rank_B1 = (position_B % chunks.chunk_size)[:, None]
        write_BN1 = write_weights(token, state, rank_B1, valid_B[:, None]).mT
        state["slots"] = state["slots"] * (1 - write_BN1 * token.erase_BTD) + write_BN1 * token.add_BTD
        if "usage" in state:
            usage_BN1 = USAGE_DECAY * state["usage"] + write_BN1.detach()
            state["usage"] = torch.where(valid_B[:, None, None], usage_BN1, state["usage"])
    return torch.cat(reads, dim=1), torch.cat(weights, dim=1), state


def slot_memory(
    commands: Commands, chunks: ChunkColumns, initial_ND: Tensor, state: State
) -> tuple[Tensor, Tensor, State]:
    """As ``slot_memory_reference``, the tokens of a chunk at once."""
    size = chunks.chunk_size
    spread = [None if part is None else chunks.arrange(part) for part in commands]
    position_BC, valid_BC = chunks.arrange(chunks.position_BT), chunks.arrange(chunks.valid_BT)
    reads, weights = [], []
    for column in range(0, chunks.num_columns, size):
        own = slice(column, column + size)
        chunk = Commands(*(None if part is None else part[:, own] for part in spread))
        state = opened(state, initial_ND, position_BC[:, column], valid_BC[:, column], size)
        weights.append(attend_slots(chunk.query_BTD, state["slots_at_start"]))
        reads.append(weights[-1] @ state["slots_at_start"])
        write_BCN = write_weights(chunk, state, position_BC[:, own] % size, valid_BC[:, own])
        state["slots"] = WriteChunk.apply(state["slots"], write_BCN, chunk.erase_BTD, chunk.add_BTD)
        if "usage" in state:
            state["usage"] = count_writes(state["usage"], write_BCN.detach(), valid_BC[:, own])
    return chunks.restore(torch.cat(reads, dim=1)), chunks.restore(torch.cat(weights, dim=1)), state


def write_token(slots_BND: Tensor, weights_BN: Tensor, erase_BD: Tensor, add_BD: Tensor) -> Tensor:
    """M ∘ (1 - w eᵀ) + w aᵀ."""
    change_BND = torch.addcmul(add_BD[:, None], erase_BD[:, None], slots_BND, value=-1)
    return torch.addcmul(slots_BND, weights_BN[:, :, None], change_BND)


class WriteChunk(torch.autograd.Function):
    """The slots (B, N, D) after the writes of a chunk, one after the other: M ← M + w (a - e ∘ M)ᵀ.

    Backwards the slots between the writes are computed again: kept, they would take N times the room of the tokens.
    """

    @staticmethod
    def forward(ctx: Any, slots_BND: Tensor, weights_BCN: Tensor, erase_BCD: Tensor, add_BCD: Tensor) -> Tensor:
        ctx.save_for_backward(slots_BND, weights_BCN, erase_BCD, add_BCD)
        for weights_BN, erase_BD, add_BD in zip(*(x.unbind(1) for x in (weights_BCN, erase_BCD, add_BCD)), strict=True):
            slots_BND = write_token(slots_BND, weights_BN, erase_BD, add_BD)
        return slots_BND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots_BND, weights_BCN, erase_BCD, add_BCD = ctx.saved_tensors
        size = weights_BCN.shape[1]
        before, after = [slots_BND], [gradient_BND]  # slots before every write, gradients of those after it
        for c in range(size - 1):
            before.append(write_token(before[-1], weights_BCN[:, c], erase_BCD[:, c], add_BCD[:, c]))
        nothing_BD = torch.zeros_like(gradient_BND[:, 0])
        for c in reversed(range(size)):  # the map is linear in the slots, with a diagonal matrix
            after.append(write_token(after[-1], weights_BCN[:, c], erase_BCD[:, c], nothing_BD))
        slots_BCND, gradient_BCND = torch.stack(before, dim=1), torch.stack(after[-2::-1], dim=1)
        product_BCND = slots_BCND * gradient_BCND
        return (
            after[-1],
            (gradient_BCND @ add_BCD[..., None] - product_BCND @ erase_BCD[..., None]).squeeze(-1),
            -(weights_BCN[:, :, None] @ product_BCND).squeeze(2),
            (weights_BCN[:, :, None] @ gradient_BCND).squeeze(2),
        )


def count_writes(usage_BN1: Tensor, weights_BCN: Tensor, valid_BC: Tensor) -> Tensor:
    """Usage after the writes of a chunk; its tokens are the first of the columns."""
    written_B1 = valid_BC.sum(dim=1, keepdim=True)
    age_BC = written_B1 - 1 - torch.arange(valid_BC.shape[1], device=valid_BC.device)
    decay_BC1 = (USAGE_DECAY ** age_BC.clamp(min=0).to(weights_BCN.dtype))[..., None]
    kept_B11 = (USAGE_DECAY ** written_B1.to(weights_BCN.dtype))[..., None]
    return kept_B11 * usage_BN1 + weights_BCN.mT @ decay_BC1


class SlotMemory(nn.Module):
    """The memory as a layer: (B, T, D) to what every token reads, (B, T, D)."""

    def __init__(self, config: MMaDAConfig, layer_idx: int, state_name: str = "slots") -> None:
        super().__init__()
        self.config, self.layer_idx, self.state_name = config, layer_idx, state_name
        width, self.chunk_size = config.hidden_size, config.hybrid.memory_chunk_size
        self.slots = nn.Parameter(torch.empty(config.hybrid.memory_slots, width))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.erase_proj = nn.Linear(width, width)
        self.add_proj = nn.Linear(width, width, bias=False)
        self.allocation_proj = nn.Linear(width, 1) if config.hybrid.slot_allocation else None

    def init_own_weights(self, config: MMaDAConfig) -> None:
        """Slots of length about 1, so that they are told apart from the start."""
        init.normal_(self.slots, mean=0.0, std=config.hidden_size**-0.5)

    def forward(self, hidden_BTD: Tensor, context: Context, past_key_values: MMaDACache | None = None) -> Tensor:
        if past_key_values is None:
            return self._scan(hidden_BTD, None, context)[0]
        return past_key_values.layers[self.layer_idx].recurrent(self.state_name).run(self._scan, hidden_BTD, context)

    def _scan(self, hidden_BTD: Tensor, state: State | None, context: Context) -> tuple[Tensor, State]:
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        initial_ND = self.slots.to(wide)
        allocation_BT1 = None
        if self.allocation_proj is not None:
            allocation_BT1 = self.allocation_proj(hidden_BTD).to(wide).sigmoid()
        commands = Commands(
            query_BTD=self.q_proj(hidden_BTD).to(wide),
            key_BTD=self.k_proj(hidden_BTD).to(wide),
            erase_BTD=self.erase_proj(hidden_BTD).to(wide).sigmoid(),
            add_BTD=self.add_proj(hidden_BTD).to(wide),
            allocation_BT1=allocation_BT1,
        )
        if state is None:
            state = initial_state(initial_ND, hidden_BTD.shape[0], with_usage=allocation_BT1 is not None)
        chunks = context.once(("slots", self.chunk_size), lambda: ChunkColumns.of(context, self.chunk_size))
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            read_BTD, weights_BTN, state = slot_memory(commands, chunks, initial_ND, state)
        observe(self, context.valid_BT(), read_weights=weights_BTN)
        if self.training and chunks.num_columns <= self.chunk_size:
            # Nobody reads what a first chunk writes; the projections still get their (zero) gradients, as on workers
            # whose rows are longer: engines that add up gradients wait for all of them.
            read_BTD = read_BTD + 0 * state["slots"].sum()
        return read_BTD.to(hidden_BTD.dtype), state

    def summarise(self, moments: dict[str, Moments]) -> dict[str, float]:
        """Share of slots that some token read with more than 1/N, and exp(entropy of the mean weights)."""
        mean_N, most_N = moments["read_weights"].mean_C, moments["read_weights"].max_C
        return {
            "slot_usage": float((most_N > 1 / len(most_N)).float().mean()),
            "effective_slots": float(torch.special.entr(mean_N).sum().exp()),
        }
