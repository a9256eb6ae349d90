"""The byte side: bytes to states, states of a patch's bytes to its vectors, and patches back to bytes.

# B rows, T bytes of this forward pass, S bytes with those of an unfinished patch before them, P patches,
# C vectors per patch, D width of a byte, G = C·D width of a patch, H heads, K head width, N sizes of n-grams
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mmada.config import MMaDAConfig
from mmada.nn.block import Block
from mmada.nn.cache import MMaDACache
from mmada.nn.context import Context, take_columns
from mmada.nn.patches.hashing import ngram_hashes

ROPE_THETA = 500_000.0  # of the local transformers (arXiv:2412.09871, section 4.8)


def local_config(config: MMaDAConfig) -> MMaDAConfig:
    """The architecture of the layers over bytes: first the encoder's, then the decoder's."""
    patches = config.patches
    local = MMaDAConfig(
        vocab_size=config.vocab_size,
        hidden_size=patches.local_size,
        num_hidden_layers=patches.encoder_layers + patches.decoder_layers,
        num_attention_heads=patches.local_heads,
        intermediate_size=-(-8 * patches.local_size // 24) * 8,  # 8/3 of the width, in eights
        mixer_types="window",
        sliding_window=patches.local_window,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
        attention_dropout=config.attention_dropout,
        pad_token_id=config.pad_token_id,
    )
    local._attn_implementation = config._attn_implementation
    return local


class HashEmbedding(nn.EmbeddingBag):
    """Sum of a row for each n-gram that ends at a byte; every size has a table of its own in the one weight."""

    def __init__(self, sizes: list[int], table_size: int, width: int) -> None:
        super().__init__(len(sizes) * table_size, width, mode="sum")
        self.sizes, self.table_size = sizes, table_size

    def init_own_weights(self, config: Any) -> None:
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)

    def forward(self, ids_BT: Tensor, index_BT: Tensor, before_BN: Tensor | None) -> Tensor:  # type: ignore[override]
        """(B, T, D). ``index_BT``: number of each byte in its document; ``before_BN``: ids before the first column."""
        rows_BTN = ngram_hashes(ids_BT, self.sizes, self.table_size, index_BT, before_BN)
        rows_BTN = rows_BTN + self.table_size * torch.arange(len(self.sizes), device=ids_BT.device)
        return super().forward(rows_BTN.flatten(0, 1)).unflatten(0, ids_BT.shape)


class ByteEncoder(nn.Module):
    """Light blocks over bytes, with the hashed n-grams added to what goes in."""

    def __init__(self, config: MMaDAConfig, local: MMaDAConfig) -> None:
        super().__init__()
        patches = config.patches
        self.hash_embedding = (
            HashEmbedding(patches.hash_sizes, patches.hash_vocab, patches.local_size) if patches.hash_sizes else None
        )
        self.layers = nn.ModuleList([Block(local, index) for index in range(patches.encoder_layers)])

    def forward(
        self,
        hidden_BTD: Tensor,
        ids_BT: Tensor,
        index_BT: Tensor,
        before_BN: Tensor | None,
        context: Context,
        cache: MMaDACache | None,
    ) -> Tensor:
        """Embedded bytes to states, (B, T, D)."""
        if self.hash_embedding is not None:
            hidden_BTD = hidden_BTD + self.hash_embedding(ids_BT, index_BT, before_BN)
        for layer in self.layers:
            hidden_BTD, _ = layer(hidden_BTD, context, past_key_values=cache)
        return hidden_BTD


class CrossAttention(nn.Module):
    """What both directions share: a norm on either side, projections, the residual; no positions."""

    def __init__(self, config: MMaDAConfig, local: MMaDAConfig) -> None:
        super().__init__()
        width, heads = local.hidden_size, local.num_attention_heads
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.residual = 2.0 if config.patches.doubled_residual else 1.0
        self.q_norm = nn.RMSNorm(width, eps=local.rms_norm_eps)
        self.k_norm = nn.RMSNorm(width, eps=local.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def _projected(self, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (..., D) to (..., H, K) each; the query is scaled."""
        asked = self.k_norm(asked)
        query, key, value = self.q_proj(self.q_norm(asking)) * self.scaling, self.k_proj(asked), self.v_proj(asked)
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)) for each in (query, key, value))
        return query, key, value

    def _joined(self, asking: Tensor, mixed: Tensor) -> Tensor:
        return self.residual * asking + self.o_proj(mixed.flatten(-2))


class PatchesReadBytes(CrossAttention):
    """Every vector of a patch attends to the patch's bytes and to no others."""

    def forward(self, patches_BPCD: Tensor, bytes_BSD: Tensor, patch_BS: Tensor) -> Tensor:
        """(B, P, C, D) to the same. ``patch_BS``: each byte's patch, P for bytes of none."""
        query_BPCHK, key_BSHK, value_BSHK = self._projected(patches_BPCD, bytes_BSD)
        return self._joined(patches_BPCD, read_bytes(query_BPCHK, key_BSHK, value_BSHK, patch_BS))


class BytesReadPatches(CrossAttention):
    """Every byte attends to the vectors of one patch."""

    def forward(self, bytes_BTD: Tensor, patches_BPCD: Tensor, patch_BT: Tensor) -> Tensor:
        """(B, T, D) to the same. ``patch_BT``: the patch that each byte looks at."""
        query_BTHK, key_BPCHK, value_BPCHK = self._projected(bytes_BTD, patches_BPCD)
        return self._joined(bytes_BTD, read_patches(query_BTHK, key_BPCHK, value_BPCHK, patch_BT))


def read_bytes(query_BPCHK: Tensor, key_BSHK: Tensor, value_BSHK: Tensor, patch_BS: Tensor) -> Tensor:
    """softmax(q kᵀ) v over each patch's own bytes, in time and memory linear in the bytes; (B, P, C, H, K).

    Bytes whose patch is P belong to none; a patch without bytes gets zeros.
    """
    wide = torch.promote_types(query_BPCHK.dtype, torch.float32)
    num_patches = query_BPCHK.shape[1]
    # One more patch takes the bytes of none, and is cut off at the end.
    query_BPCHK = nn.functional.pad(query_BPCHK, (0, 0, 0, 0, 0, 0, 0, 1))
    scores_BSCH = torch.einsum("bschk,bshk->bsch", take_columns(query_BPCHK, patch_BS), key_BSHK).to(wide)
    index_BSCH = patch_BS[:, :, None, None].expand(scores_BSCH.shape)
    per_patch = (scores_BSCH.shape[0], num_patches + 1, *scores_BSCH.shape[2:])
    largest = scores_BSCH.new_full(per_patch, -torch.inf).scatter_reduce(1, index_BSCH, scores_BSCH.detach(), "amax")
    weights_BSCH = (scores_BSCH - largest.gather(1, index_BSCH)).exp()
    total = scores_BSCH.new_zeros(per_patch).scatter_add(1, index_BSCH, weights_BSCH)
    weights_BSCH = (weights_BSCH / total.gather(1, index_BSCH)).to(value_BSHK.dtype)
    weighted_BSCHK = weights_BSCH[..., None] * value_BSHK[:, :, None]
    index_BSCHK = index_BSCH[..., None].expand(weighted_BSCHK.shape)
    mixed = value_BSHK.new_zeros(*per_patch, value_BSHK.shape[-1]).scatter_add(1, index_BSCHK, weighted_BSCHK)
    return mixed[:, :num_patches]


def read_bytes_reference(query_BPCHK: Tensor, key_BSHK: Tensor, value_BSHK: Tensor, patch_BS: Tensor) -> Tensor:
    """As ``read_bytes``, with the scores of every patch and every byte; patches must have bytes."""
    own_BPS = patch_BS[:, None] == torch.arange(query_BPCHK.shape[1], device=patch_BS.device)[:, None]
    scores = torch.einsum("bpchk,bshk->bpchs", query_BPCHK, key_BSHK)
    weights = scores.masked_fill(~own_BPS[:, :, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bpchs,bshk->bpchk", weights, value_BSHK)


def read_patches(query_BTHK: Tensor, key_BPCHK: Tensor, value_BPCHK: Tensor, patch_BT: Tensor) -> Tensor:
    """softmax(q kᵀ) v over the C vectors of each byte's patch, (B, T, H, K)."""
    wide = torch.promote_types(query_BTHK.dtype, torch.float32)
    scores_BTCH = torch.einsum("bthk,btchk->btch", query_BTHK, take_columns(key_BPCHK, patch_BT))
    weights_BTCH = scores_BTCH.softmax(dim=2, dtype=wide).to(value_BPCHK.dtype)
    return torch.einsum("btch,btchk->bthk", weights_BTCH, take_columns(value_BPCHK, patch_BT))


class PatchPooling(nn.Module):
    """The vectors of each patch, from the states of its bytes."""

    def __init__(self, config: MMaDAConfig, local: MMaDAConfig) -> None:
        super().__init__()
        self.num_vectors = config.patches.cross_attention_k
        self.patch_proj = nn.Linear(local.hidden_size, self.num_vectors * local.hidden_size, bias=False)
        self.cross_attention = PatchesReadBytes(config, local)

    def forward(self, bytes_BSD: Tensor, patch_BS: Tensor, num_patches: int) -> Tensor:
        """(B, P, G): the largest of the bytes' states in each channel asks the bytes. ``patch_BS`` P: no patch."""
        batch, _, width = bytes_BSD.shape
        index_BSD = patch_BS[..., None].expand(bytes_BSD.shape)
        pooled_BPD = bytes_BSD.new_zeros(batch, num_patches + 1, width)
        pooled_BPD = pooled_BPD.scatter_reduce(1, index_BSD, bytes_BSD, "amax", include_self=False)[:, :num_patches]
        vectors_BPCD = self.patch_proj(pooled_BPD).unflatten(-1, (self.num_vectors, width))
        return self.cross_attention(vectors_BPCD, bytes_BSD, patch_BS).flatten(-2)


class ByteDecoder(nn.Module):
    """Bytes ask a finished patch before each light block; the last norm."""

    def __init__(self, config: MMaDAConfig, local: MMaDAConfig) -> None:
        super().__init__()
        patches = config.patches
        self.num_vectors = patches.cross_attention_k
        self.patch_proj = nn.Linear(config.hidden_size, self.num_vectors * local.hidden_size, bias=False)
        first = patches.encoder_layers
        self.layers = nn.ModuleList([Block(local, first + index) for index in range(patches.decoder_layers)])
        self.cross_attentions = nn.ModuleList([BytesReadPatches(config, local) for _ in self.layers])
        self.norm = nn.RMSNorm(local.hidden_size, eps=local.rms_norm_eps)

    def forward(
        self, bytes_BTD: Tensor, patches_BPG: Tensor, patch_BT: Tensor, context: Context, cache: MMaDACache | None
    ) -> Tensor:
        """States of the encoder to normed states, (B, T, D). ``patch_BT``: the patch that each byte looks at."""
        vectors_BPCD = self.patch_proj(patches_BPG).unflatten(-1, (self.num_vectors, -1))
        for cross_attention, layer in zip(self.cross_attentions, self.layers, strict=True):
            bytes_BTD = cross_attention(bytes_BTD, vectors_BPCD, patch_BT)
            bytes_BTD, _ = layer(bytes_BTD, context, past_key_values=cache)
        return self.norm(bytes_BTD)
