"""Attention against transformers' models that compute the same, and every kind of it against itself."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, LlamaConfig, Qwen3Config
from transformers.masking_utils import create_causal_mask
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mmada.config import MMaDAConfig
from mmada.nn.cache import MMaDACache
from mmada.nn.mixers.attention import Attention
from mmada.nn.sparsemax import sparsemax
from tests.mmada.nn.attention_layers import KINDS, make_attention, random_states, value_and_gradients
from tests.mmada.nn.layers import make_context, run_mixer

CLOSE = {"rtol": 1e-6, "atol": 1e-9}

SHAPE = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
    "attention_bias": True,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.fixture(params=sorted(ROPES))
def pair(request):
    torch.manual_seed(0)
    ours_config = MMaDAConfig(**SHAPE, rope_parameters=dict(ROPES[request.param]))
    theirs_config = LlamaConfig(**SHAPE, rope_parameters=dict(ROPES[request.param]))
    for config in (ours_config, theirs_config):
        config._attn_implementation = "sdpa"
    ours, theirs = Attention(ours_config, 0).double(), LlamaAttention(theirs_config, 0).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, LlamaRotaryEmbedding(theirs_config)


def test_equals_llama_by_value_and_gradient(pair):
    ours, theirs, llama_rotary = pair
    position_ids = torch.arange(29)[None].expand(2, -1)
    states = torch.randn(2, 29, 48, dtype=torch.float64)
    direction = torch.randn(2, 29, 48, dtype=torch.float64)
    outputs, gradients = [], []
    for attention in (ours, theirs):
        own = states.clone().requires_grad_()
        if attention is ours:
            output = run_mixer(ours, own)
        else:
            mask = create_causal_mask(
                config=theirs.config, inputs_embeds=own, attention_mask=None, past_key_values=None, position_ids=None
            )
            rotary = llama_rotary(own, position_ids)
            output, _ = theirs(own, position_embeddings=rotary, attention_mask=mask)
        (output * direction).sum().backward()
        outputs.append(output)
        gradients.append([own.grad] + [p.grad for p in attention.parameters()])
    assert_close(*outputs, rtol=1e-6, atol=1e-9)
    for mine, llamas in zip(*gradients, strict=True):
        assert_close(mine, llamas, rtol=1e-6, atol=1e-9)


def test_eager_equals_sdpa_and_returns_weights_that_sum_to_one(pair):
    ours, _, _ = pair
    states = torch.randn(1, 17, 48, dtype=torch.float64)
    results = {}
    for kernel in ("sdpa", "eager"):
        ours.config._attn_implementation = kernel
        results[kernel] = ours(states, make_context(ours.config, 1, 17))
    assert_close(results["eager"][0], results["sdpa"][0], rtol=1e-6, atol=1e-9)
    weights_BHTS = results["eager"][1]
    assert weights_BHTS.shape == (1, 6, 17, 17)
    assert_close(weights_BHTS.sum(-1), torch.ones(1, 6, 17, dtype=torch.float64))
    assert weights_BHTS.triu(1).abs().max() == 0


@pytest.mark.parametrize(
    ("model", "theirs_config", "ours", "kernel"),
    [
        (Qwen3Attention, Qwen3Config(**SHAPE), {"qk_norm": True}, "sdpa"),
        # A cap that bends most scores.
        (
            Gemma2Attention,
            Gemma2Config(**SHAPE, attn_logit_softcapping=0.5, query_pre_attn_scalar=16),
            {"attn_logit_softcapping": 0.5},
            "eager",
        ),
    ],
    ids=["qk-norm of Qwen 3", "soft cap of Gemma 2"],
)
def test_equals_models_with_more_than_llama_has(model, theirs_config, ours, kernel):
    torch.manual_seed(0)
    config = MMaDAConfig(**SHAPE, **ours, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    config._attn_implementation = theirs_config._attn_implementation = kernel
    mine, theirs = Attention(config, 0).double(), model(theirs_config, 0).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mine.load_state_dict(theirs.state_dict())
    states, direction = random_states(2, 29, 48), random_states(2, 29, 48, seed=2)
    mask = torch.zeros(29, 29, dtype=torch.float64).masked_fill(torch.ones(29, 29).triu(1).bool(), -torch.inf)
    results = []
    for attention in (mine, theirs):
        own = states.clone().requires_grad_()
        if attention is mine:
            output = run_mixer(mine, own)
        else:
            rotary = make_context(config, 2, 29).rotary
            output, *_ = theirs(own, position_embeddings=rotary, attention_mask=mask[None, None])
        (output * direction).sum().backward()
        results.append([output.detach(), own.grad, *(p.grad for p in attention.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)  # they norm and normalise in float32 always


def test_sparsemax_takes_the_place_of_softmax():
    layer = make_attention(kernel="eager", attention_normalizer="sparsemax", position_embedding_type="none")
    states = random_states(2, 17)
    output, weights = layer(states, make_context(layer.config, 2, 17), None)
    query = layer.q_proj(states).view(2, 17, 4, 2, 4)
    key = layer.k_proj(states).view(2, 17, 4, 4)
    scores = torch.einsum("btgik,bsgk->bgits", query, key) / 2
    causal = torch.ones(17, 17).tril().bool()
    expected = sparsemax(scores.masked_fill(~causal, -torch.inf)).flatten(1, 2)
    assert_close(weights, expected, **CLOSE)
    assert (weights[..., causal] == 0).any()
    layer.config._attn_implementation = "sdpa"  # hands on to the formula
    assert_close(run_mixer(layer, states), output, **CLOSE)


@pytest.mark.parametrize("position", ["alibi", "relative"])
def test_biased_positions_are_added_to_the_scores(position):
    """Where a learned bias is scaled with the scores it counts 1/sqrt(head_dim) times."""
    states = random_states(1, 40)
    layers = [make_attention(kernel="eager", position_embedding_type=position, relative_bias_scaling=scaling)
              for scaling in ("after", "before")]  # fmt: skip
    logs = []
    for layer in [make_attention(kernel="eager", position_embedding_type="none"), *layers]:
        weights = layer(states, make_context(layer.config, 1, 40))[1]
        logs.append(weights.log()[0, :, 39] - weights.log()[0, :, 39, :1])
    plain, after, before = logs
    bias = after - plain
    assert bias.abs().max() > 0.01
    assert_close(before - plain, bias / (2 if position == "relative" else 1), **CLOSE)


@pytest.mark.parametrize(
    ("kernel", "position", "persistent"),
    [("sdpa", "rope", 0), ("sdpa", "alibi", 2), ("eager", "relative", 0), ("blockwise", "relative", 2)],
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_equals_one_forward_pass(kind, kernel, position, persistent):
    """One row in pieces of odd sizes, and rows of different lengths, both longer than bands and blocks."""
    layer = make_attention(kind, kernel, num_persistent=persistent, position_embedding_type=position)
    states = random_states(3, 100)
    full = run_mixer(layer, states)
    for cuts in ([37, 38, 39, 40], [1, 64], [63]):
        cache = MMaDACache(1)
        pieces = [run_mixer(layer, piece, cache=cache) for piece in states.tensor_split(cuts, dim=1)]
        assert_close(torch.cat(pieces, dim=1), full, **CLOSE)
    cache, lengths = MMaDACache(1), [60, 41, 0]
    for more in (lengths, [3, 0, 1], [37, 50, 2], [0, 1, 1]):
        done = cache.lengths_B if cache.columns else torch.zeros(3, dtype=torch.long)
        new = torch.randn(3, 61, 24, dtype=torch.float64)  # whatever padding holds
        for row, (begin, count) in enumerate(zip(done, more, strict=True)):
            new[row, :count] = states[row, begin : begin + count]
        output = run_mixer(layer, new, cache=cache, lengths=more)
        assert output.isfinite().all()
        for row, (begin, count) in enumerate(zip(done, more, strict=True)):
            assert_close(output[row, :count], full[row, begin : begin + count], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_good_as_rows_of_their_own(kind):
    layer, lengths = make_attention(kind, position_embedding_type="alibi"), [45, 1, 7, 47]
    states = random_states(1, 100)
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths))[None]
    packed = value_and_gradients(layer, states, documents=documents)
    own = states.clone().requires_grad_()
    layer.zero_grad()
    alone = torch.cat([run_mixer(layer, part) for part in own.split(lengths, dim=1)], dim=1)
    (alone * random_states(1, 100, seed=2)).sum().backward()
    for a, b in zip(packed, [alone.detach(), own.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_behind_packed_documents_sees_something_whatever_its_document(kind, normalizer):
    """Else the plain formula has rows of NaN, which reach the gradients of all keys."""
    layer = make_attention(kind, "eager", position_embedding_type="none", attention_normalizer=normalizer)
    states, documents = random_states(2, 20), torch.tensor([[0] * 9 + [1] * 11, [0] * 5 + [1] * 12 + [0, 7, 8]])
    gradients = []
    for padding in (documents, documents.clamp(max=1).cummax(dim=1).values):
        layer.zero_grad()
        output = run_mixer(layer, states, documents=padding, lengths=[20, 17])
        assert output.isfinite().all()
        (output[0].sum() + (output[1, :17] ** 2).sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert_close(*gradients, **CLOSE)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_token_changes_nothing_before_it(kind, kernel):
    layer, states = make_attention(kind, kernel, position_embedding_type="relative"), random_states(1, 100)
    for token in (0, 40, 99):
        changed = states.clone()
        changed[0, token] += 1
        before, after = run_mixer(layer, states), run_mixer(layer, changed)
        assert torch.equal(before[:, :token], after[:, :token])
        assert not torch.equal(before[:, token], after[:, token])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_follows_single(kind):
    layer = make_attention(kind, qk_norm=True, attn_logit_softcapping=5.0, position_embedding_type="alibi").float()
    states = random_states(2, 70).float()
    expected = run_mixer(layer, states)
    half = run_mixer(layer.bfloat16(), states.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), expected, rtol=0.1, atol=0.1 * expected.std().item())


def test_what_is_not_chosen_leaves_no_parameter():
    names = {f"{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")}
    for kind in KINDS:
        assert set(make_attention(kind, attention_bias=True).state_dict()) == names
    extra = make_attention(qk_norm=True, position_embedding_type="relative", num_persistent=3)
    assert {name: tuple(tensor.shape) for name, tensor in extra.state_dict().items() if "_proj" not in name} == {
        "q_norm.weight": (4,),
        "k_norm.weight": (4,),
        "relative_bias.embedding.weight": (32, 8),
        "persistent.persistent_key": (4, 3, 4),
        "persistent.persistent_value": (4, 3, 4),
    }


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "blockwise"])
@pytest.mark.parametrize("kind", ["attention", "window"])
def test_persistent_rows_are_a_learned_prefix_without_place(kind, kernel):
    """Every query sees them, unrotated and unbiased, whatever its window."""
    layer = make_attention(kind, kernel, num_persistent=3, position_embedding_type="alibi")
    states = random_states(2, 70)
    output = run_mixer(layer, states)
    query, key, value = (
        proj(states).view(2, 70, -1, 4).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    key, value = (
        torch.cat([learned.expand(2, -1, -1, -1), own], dim=2).repeat_interleave(2, dim=1)
        for learned, own in ((layer.persistent.persistent_key, key), (layer.persistent.persistent_value, value))
    )
    distance = torch.arange(70)[:, None] - torch.arange(70)
    slopes = 2.0 ** -torch.arange(1, 9, dtype=torch.float64)
    bias = -slopes[:, None, None] * distance
    bias = bias.masked_fill((distance < 0) | (distance >= (5 if kind == "window" else 70)), -torch.inf)
    scores = query @ key.transpose(2, 3) / 2 + torch.nn.functional.pad(bias, (3, 0))
    expected = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    assert_close(output, expected, **CLOSE)
