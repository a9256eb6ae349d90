"""A tiny Byte Latent Transformer of transformers and the same model of ours, with the same weights, in float64."""

import torch
from transformers import BltConfig, BltForCausalLM
from transformers.models.blt import modeling_blt

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj")


def exact_norm(self, hidden_states):
    """transformers' norm without its detour over float32."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def make_pair(monkeypatch, window=None, threshold=None):
    """(ours, theirs); boundaries by entropy above ``threshold``, or none of their own with None."""
    monkeypatch.setattr(modeling_blt.BltRMSNorm, "forward", exact_norm)
    local = {"vocab_size": 264, "hidden_size": 32, "num_attention_heads": 2, "hidden_size_global": 64}
    theirs_config = BltConfig(
        vocab_size=264,
        encoder_hash_byte_group_vocab=101,
        encoder_hash_byte_group_size=[3, 5],
        local_attention_window_len=window,
        patching_threshold=threshold,
        patch_in_forward=threshold is not None,
        encoder_config={**local, "num_hidden_layers": 1, "intermediate_size": 88, "rope_parameters": dict(ROPE)},
        decoder_config={**local, "num_hidden_layers": 2, "intermediate_size": 88, "rope_parameters": dict(ROPE)},
        global_config={
            "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96,
            "rope_parameters": dict(ROPE),
        },
        patcher_config={
            "vocab_size": 264, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
            "intermediate_size": 24, "sliding_window": None,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = BltForCausalLM._from_config(theirs_config, attn_implementation="sdpa").double().eval()
    entropy_model = {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 24,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    ours_config = MMaDAConfig(
        vocab_size=264,
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=96,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPE),
        tie_word_embeddings=False,
        patches={
            "mode": "static" if threshold is None else "entropy", "size": 3, "threshold": threshold,
            "entropy_model": entropy_model, "local_size": 32, "encoder_layers": 1, "decoder_layers": 2,
            "local_window": window or 1000, "doubled_residual": True, "hash_sizes": [3, 5], "hash_vocab": 101,
        },
    )  # fmt: skip
    ours = MMaDAForCausalLM(ours_config).double().eval()
    ours.load_state_dict(converted(theirs))
    return ours, theirs


def converted(theirs):
    """Their weights under our names."""
    names = (
        ("model.local_encoder.embed_tokens", "model.embed_tokens"),
        ("model.local_encoder.patch_embedding_projection", "model.patches.pooling.patch_proj"),
        ("model.local_encoder.cross_attn_layers.0", "model.patches.pooling.cross_attention"),
        ("model.local_encoder.layers", "model.patches.encoder.layers"),
        ("model.encoder_hash_tok_embedding", "model.patches.encoder.hash_embedding"),
        ("model.global_transformer.layers", "model.layers"),
        ("model.local_decoder.patch_embedding_projection", "model.patches.decoder.patch_proj"),
        ("model.local_decoder.cross_attn_layers", "model.patches.decoder.cross_attentions"),
        ("model.local_decoder", "model.patches.decoder"),
        ("model.patcher.lm_head", "model.patches.entropy_model.lm_head"),
        ("model.patcher", "model.patches.entropy_model.model"),
        (".self_attn.", ".mixer."),
    )
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name.endswith(tuple(f"{part}.weight" for part in ATTENTION)):
            weight = halves_from_pairs(weight, heads_of(theirs, name))
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = weight
    return weights


def heads_of(theirs, name):
    """Heads of the attention that a weight belongs to."""
    return theirs.get_submodule(name.rsplit(".", 2)[0]).num_heads


def halves_from_pairs(weight, heads):
    """Rows of a query or key projection: they turn neighbours as a pair, we turn the halves of a head."""
    rows = torch.arange(weight.shape[0]).view(heads, -1, 2)
    return weight[rows.transpose(1, 2).flatten()]
