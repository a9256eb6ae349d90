"""The way of a byte through the model: bytes → patches → the stack of blocks → bytes.

A byte is decoded with the stack's output for the last patch that ended at or before it (one patch behind its own,
arXiv:2412.09871, section 3.3): what its own patch will hold would give away the bytes to come. A patch goes through
the stack once, when its last byte is known; an unfinished one does not.

# B rows, T bytes of this forward pass, S bytes with those of an unfinished patch before them, P patches finished,
# N ids before the first byte, D width of a byte, G width of a patch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache
from mmada.nn.context import Context
from mmada.nn.observing import Moments, observe
from mmada.nn.patches.boundaries import byte_classes, entropies, patch_ends
from mmada.nn.patches.local import ByteDecoder, ByteEncoder, PatchPooling, local_config
from mmada.nn.patches.state import PatchState
from mmada.nn.positions import rotary_cos_sin

Stack = Callable[[Tensor, Context, MMaDACache | None], MoeModelOutputWithPast]


@dataclass
class PatchedOutput(MoeModelOutputWithPast):
    """``last_hidden_state`` is over bytes; all else over the patches that this forward pass finished.

    ``num_patches`` (B,) counts these. Rows with fewer have padding behind them, but none in ``router_logits``.
    """

    num_patches: Tensor | None = None


class BytePatches(nn.Module):
    """Everything around the stack of blocks. ``entropy_model``: a causal model of bytes; it stays as it is."""

    def __init__(self, config: MMaDAConfig, entropy_model: PreTrainedModel | None) -> None:
        super().__init__()
        self.config, self.local_config = config, local_config(config)
        self.encoder = ByteEncoder(config, self.local_config)
        self.pooling = PatchPooling(config, self.local_config)
        self.decoder = ByteDecoder(config, self.local_config)
        self.entropy_model = entropy_model
        self.train(self.training)

    def train(self, mode: bool = True) -> BytePatches:
        """Training or evaluation, of all but the entropy model: boundaries do not depend on what learns around it."""
        super().train(mode)
        if self.entropy_model is not None:
            self.entropy_model.requires_grad_(False).eval()  # from_pretrained makes parameters anew, and ends with eval
        return self

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """What transformers asks the children of a model about weights that are tied inside them."""
        if self.entropy_model is None:
            return {}
        tied: dict[str, str] = self.entropy_model.all_tied_weights_keys
        return {f"entropy_model.{own}": f"entropy_model.{other}" for own, other in tied.items()}

    def forward(
        self, ids_BT: Tensor, hidden_BTD: Tensor, context: Context, cache: MMaDACache | None, run_stack: Stack
    ) -> PatchedOutput:
        """Embedded bytes (B, T, D), rows in front layout, to normed states (B, T, D).

        ``run_stack(patches_BPG, context, cache)`` runs the blocks; where no row finished a patch it is not called.
        """
        self.local_config._attn_implementation = self.config._attn_implementation  # which may be set at any time
        state = None if cache is None else cache.layers[0].part("patches", self._new_state)
        local = None if state is None else state.local
        index_BT = numbers_in_documents(context.index_BT().expand(context.shape), context.documents_BT)
        reading_BT = self._readings(ids_BT, context, state)
        ends_BT = self._ends(reading_BT, index_BT, context, state)
        before_BN = None if state is None else state.bytes.last("id", state.num_ids)
        states_BTD = self.encoder(hidden_BTD, ids_BT, index_BT, before_BN, context, local)

        outputs = self._stack(states_BTD, ends_BT, context, state, run_stack)
        patches_BPG = outputs.last_hidden_state
        patch_BT = ends_BT.cumsum(dim=1)
        before_B1G = None if state is None else state.outputs.last("output", 1)
        if before_B1G is None:
            patch_BT = (patch_BT - 1).clamp(min=0)  # byte 0 ends a patch; below 0 is padding
        else:
            patches_BPG = before_B1G if patches_BPG is None else torch.cat([before_B1G, patches_BPG], dim=1)
        if state is not None:
            read = {"id": ids_BT, "reading": reading_BT, "end": ends_BT, "state": states_BTD}
            state.bytes.append(read, context.lengths_B)
            if outputs.last_hidden_state is not None:
                state.outputs.append({"output": outputs.last_hidden_state}, outputs.num_patches)
            if not state.recording:
                state.settle()
        outputs.last_hidden_state = self.decoder(states_BTD, patches_BPG, patch_BT, context, local)
        if local is not None:
            local.advance(context.shape[1], context.valid_BT())
        num_bytes_B = torch.full_like(outputs.num_patches, context.shape[1])
        num_bytes_B = num_bytes_B if context.lengths_B is None else context.lengths_B
        observe(self, bytes=num_bytes_B[:, None], patches=outputs.num_patches[:, None])
        return outputs

    def summarise(self, moments: dict[str, Moments]) -> dict[str, float]:
        """Mean patch size, and steps of the stack for each byte, over what was observed."""
        size = moments["bytes"].mean / max(moments["patches"].mean, torch.finfo().tiny)
        return {"bytes_per_patch": size, "stack_steps_per_byte": 1 / size}

    def _new_state(self) -> PatchState:
        own, sizes = self.config.patches, self.config.patches.hash_sizes
        return PatchState(
            num_local=own.encoder_layers + own.decoder_layers,
            num_stack=self.config.num_hidden_layers,
            num_entropy=0 if self.entropy_model is None else self.entropy_model.config.num_hidden_layers,
            num_ids=max(sizes) - 1 if sizes else 0,
        )

    def _readings(self, ids_BT: Tensor, context: Context, state: PatchState | None) -> Tensor:
        """What the rule reads of each byte, (B, T)."""
        own = self.config.patches
        if self.entropy_model is None:
            return byte_classes(ids_BT) if own.mode == "space" else torch.zeros_like(ids_BT, dtype=torch.bool)
        if own.threshold is None:
            raise ValueError("patches.threshold=null is not known yet; set it to what mmada train found for this text")
        valid_BT = context.valid_BT()
        with torch.no_grad():
            outputs = self.entropy_model(
                input_ids=ids_BT,
                attention_mask=valid_BT,
                position_ids=context.position_ids_BT,
                past_key_values=None if state is None else state.entropy,
                use_cache=state is not None,
            )
        return entropies(outputs.logits)

    def _ends(self, reading_BT: Tensor, index_BT: Tensor, context: Context, state: PatchState | None) -> Tensor:
        """Whether a patch ends at each byte, (B, T); never at padding."""
        before_B1 = None if state is None else state.bytes.last("reading", 1)
        ends_BT = patch_ends(
            self.config.patches,
            index_BT,
            reading_BT,
            before_B=None if before_B1 is None else before_B1[:, 0],
            open_B=None if state is None else state.open_B(),
        )
        valid_BT = context.valid_BT()
        return ends_BT if valid_BT is None else ends_BT & valid_BT

    def _stack(
        self, states_BTD: Tensor, ends_BT: Tensor, context: Context, state: PatchState | None, run_stack: Stack
    ) -> PatchedOutput:
        """The stack on the patches that end here; without states where none does and there were some before."""
        finished_B = ends_BT.sum(dim=1)
        open_B = None if state is None else state.open_B()
        # One wait for the device for all the numbers that shapes depend on.
        least, most, longest = torch.stack(
            [*finished_B.aminmax(), finished_B.new_zeros(()) if open_B is None else open_B.max()]
        ).tolist()
        if most == 0 and open_B is not None:
            return PatchedOutput(last_hidden_state=None, num_patches=finished_B)
        most = max(most, 1)  # a first pass over nothing but padding
        documents_BP = None
        bytes_BSD, patch_BS = states_BTD, ends_BT.cumsum(dim=1) - ends_BT.long()
        if state is not None and open_B is not None and longest:
            column_S = torch.arange(longest, device=open_B.device)
            is_open_BS = column_S >= longest - open_B[:, None]
            patch_BS = torch.cat([torch.where(is_open_BS, 0, most), patch_BS], dim=1)
            bytes_BSD = torch.cat([state.bytes.last("state", longest), states_BTD], dim=1)
        patch_BS = torch.where(patch_BS < finished_B[:, None], patch_BS, most)
        if context.documents_BT is not None:  # a document's last patch may stay unfinished for ever
            documents_BP = documents_of_patches(context.documents_BT, ends_BT, most)
            is_own_BS = documents_BP.gather(1, patch_BS.clamp(max=most - 1)) == context.documents_BT
            patch_BS = torch.where(is_own_BS, patch_BS, most)

        stack_cache = None if state is None else state.stack
        lengths_B = None if least == most else finished_B
        stack_context = self._stack_context((len(finished_B), most), lengths_B, documents_BP, stack_cache, states_BTD)
        outputs = run_stack(self.pooling(bytes_BSD, patch_BS, most), stack_context, stack_cache)
        valid_BP = stack_context.valid_BT()
        if stack_cache is not None:
            stack_cache.advance(most, valid_BP)
        router_logits = outputs.router_logits
        if router_logits is not None and valid_BP is not None:
            router_logits = tuple(logits_TE[valid_BP.flatten()] for logits_TE in router_logits)
        return PatchedOutput(**{**outputs, "router_logits": router_logits, "num_patches": finished_B})

    def _stack_context(
        self,
        shape: tuple[int, int],
        lengths_B: Tensor | None,
        documents_BP: Tensor | None,
        cache: MMaDACache | None,
        like: Tensor,
    ) -> Context:
        """What the blocks are told about patches: they are numbered as bytes are; on the device and in the dtype of
        ``like``."""
        past_B = None if cache is None else cache.lengths_B
        least_past, past = (0, 0) if cache is None else cache.past_range
        start = past if past_B is None else past_B[:, None]
        index_BP = (start + torch.arange(shape[1], device=like.device)[None]).expand(shape)
        position_ids_BP = numbers_in_documents(index_BP, documents_BP)
        has_rotary = self.config.position_embedding_type == "rope"
        return Context(
            shape=shape,
            device=like.device,
            position_ids_BT=position_ids_BP,
            lengths_B=lengths_B,
            past=past,
            past_B=past_B,
            least_past=least_past,
            documents_BT=documents_BP,
            rotary=rotary_cos_sin(self.config, position_ids_BP, like.dtype) if has_rotary else None,
        )


def documents_of_patches(documents_BT: Tensor, ends_BT: Tensor, num_patches: int) -> Tensor:
    """The document of each finished patch, (B, P); padding goes with the last."""
    index_BT = torch.where(ends_BT, ends_BT.cumsum(dim=1) - 1, num_patches)
    documents_BP = documents_BT.new_zeros(documents_BT.shape[0], num_patches + 1)
    return documents_BP.scatter(1, index_BT, documents_BT)[:, :num_patches].cummax(dim=1).values


def numbers_in_documents(index_BT: Tensor, documents_BT: Tensor | None) -> Tensor:
    """Number of each token in its document, from its number in the row; both (B, T). A row has one without documents.

    Documents stand in rows that start with number 0.
    """
    if documents_BT is None:
        return index_BT
    is_first_BT = nn.functional.pad(documents_BT[:, 1:] != documents_BT[:, :-1], (1, 0), value=True)
    return index_BT - torch.where(is_first_BT, index_BT, 0).cummax(dim=1).values
