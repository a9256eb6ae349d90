"""The four layers around the neural memory: their formulas, and the same answers however their tokens come."""

import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import normalize, pad, silu
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.cache import MMaDACache
from mmada.nn.chunks import Rows
from mmada.nn.memory_layer import unpack_state
from mmada.nn.neural_memory import Gates, MemoryRule, MemoryState, memory_scan_reference, run_memory
from mmada.nn.observing import collect_statistics, record
from mmada.nn.positions import rotary_cos_sin, rotate
from tests.mmada.nn.layers import run_mixer

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
WIDTH = 16
KINDS = ("memory", "memory_context", "memory_gate", "memory_layer")
MEMORY = {
    "num_heads": 2,
    "head_dim": 6,
    "chunk_size": 3,
    "segment_size": 7,
    "num_persistent_tokens": 2,
    "max_step": 1.0,
}
# Every part off, or in another form, in one of them.
OPTIONS = {
    "default": {},
    "linear without parts": {
        "depth": 1, "momentum": False, "forgetting": False, "convolution": False, "num_persistent_tokens": 0,
        "max_gradient_norm": None, "segment_size": 6, "attention": "attention",
    },
    "hard": {"depth": 3, "gate": "hard", "surprise_threshold": 0.5, "activation": "silu", "chunk_size": 4},
    "soft": {"gate": "soft", "momentum": False, "chunk_size": 1, "segment_size": 1, "conv_kernel": 2},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)
every_option = pytest.mark.parametrize("options", OPTIONS)


def make_model(kind, options="default", **overrides):
    """Two layers, every weight random, so that no gate hides what is behind it."""
    settings = {
        "vocab_size": 40, "hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 2, "intermediate_size": 24, "sliding_window": 4, "mixer_types": kind,
        "memory": {**MEMORY, **OPTIONS[options]},
    }  # fmt: skip
    config = MMaDAConfig(**{**settings, **overrides})
    torch.manual_seed(0)
    model = MMaDAForCausalLM._from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def make_mixer(kind, options="default", **overrides):
    return make_model(kind, options, **overrides).model.layers[1].mixer


def tokens(batch, length, seed=1):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_kind
@every_option
@torch.no_grad()
def test_rows_of_any_length_in_any_pieces_equal_single_rows_at_once(kind, options):
    mixer, hidden, cache = make_mixer(kind, options), tokens(3, 30), MMaDACache(2)
    pieces = [[5, 0, 3], [1, 1, 1], [0, 9, 2], [8, 8, 8], [1, 0, 0], [1, 1, 0]]
    fed, outputs = [0, 0, 0], [[], [], []]
    for counts in pieces:
        width = max(counts) + (counts != [1, 1, 1])
        piece = torch.full((3, width, WIDTH), 7.0, dtype=torch.float64)
        for row, count in enumerate(counts):
            piece[row, :count] = hidden[row, fed[row] : fed[row] + count]
        lengths = None if min(counts) == width else counts
        output = run_mixer(mixer, piece, cache=cache, lengths=lengths)
        assert output.isfinite().all()
        for row, count in enumerate(counts):
            outputs[row].append(output[row, :count])
            fed[row] += count
    for row, total in enumerate(fed):
        alone = run_mixer(mixer, hidden[row : row + 1, :total])
        assert_close(torch.cat(outputs[row])[None], alone, **CLOSE)
    assert cache.num_bytes() > 0


@every_kind
@torch.no_grad()
def test_token_by_token_equals_odd_chunks_equals_at_once(kind):
    mixer, hidden = make_mixer(kind), tokens(2, 25)
    full = run_mixer(mixer, hidden)
    for ends in (range(1, 26), [5, 6, 17, 25], [7, 14, 21, 25]):
        cache, outputs = MMaDACache(2), []
        for begin, end in zip([0, *ends], ends, strict=False):
            outputs.append(run_mixer(mixer, hidden[:, begin:end], cache=cache))
        assert_close(torch.cat(outputs, dim=1), full, **CLOSE)


@every_kind
def test_packed_documents_equal_rows_of_their_own(kind):
    """By gradient, too; with padding behind the last document, and with documents of different number per row."""
    mixer, lengths = make_mixer(kind), [[8, 1, 6], [15]]
    rows = [[tokens(1, n, seed=10 * n + i) for i, n in enumerate(row)] for row in lengths]
    packed = torch.full((2, 17, WIDTH), 3.0, dtype=torch.float64)
    documents = torch.full((2, 17), 9)
    for row, parts in enumerate(rows):
        packed[row, :15] = torch.cat(parts, dim=1)
        documents[row, :15] = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths[row]))
    direction, gradients = tokens(2, 15, seed=4), []
    together = run_mixer(mixer, packed, documents=documents, lengths=[15, 15])
    (together[:, :15] * direction).sum().backward()
    gradients.append([p.grad.clone() for p in mixer.parameters()])
    mixer.zero_grad()
    alone = torch.cat([torch.cat([run_mixer(mixer, part) for part in row], dim=1) for row in rows])
    (alone * direction).sum().backward()
    gradients.append([p.grad for p in mixer.parameters()])
    assert_close(together[:, :15], alone, **CLOSE)
    assert_close(*gradients, **CLOSE)


@every_kind
@every_option
def test_a_token_changes_nothing_before_it_and_everything_is_trained(kind, options):
    mixer, hidden = make_mixer(kind, options), tokens(2, 20)
    output = run_mixer(mixer, hidden)
    for t in (0, 6, 7, 13):
        changed = hidden.clone()
        changed[:, t] = -changed[:, t]
        after = run_mixer(mixer, changed)
        assert torch.equal(after[:, :t], output[:, :t])
        assert not torch.isclose(after[:, t:], output[:, t:]).all(dim=-1).any()  # it is remembered to the end
    (output * tokens(2, 20, seed=3)).sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


@every_kind
def test_padding_leaves_gradients_alone(kind):
    """Whatever stands there."""
    mixer, hidden, lengths = make_mixer(kind), tokens(3, 12), [12, 0, 5]
    gradients = []
    for filler in (0.0, 1e6):
        mixer.zero_grad()
        padded = hidden.clone()
        for row, length in enumerate(lengths):
            padded[row, length:] = filler
        output = run_mixer(mixer, padded, lengths=lengths)
        (output[0] ** 2).sum().add((output[2, :5] ** 2).sum()).backward()
        gradients.append([p.grad.clone() for p in mixer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[1])
    assert_close(*gradients, **CLOSE)


@every_kind
@torch.inference_mode()
def test_evaluation_teaches_the_memory_and_leaves_trained_weights_alone(kind):
    model, ids = make_model(kind), torch.arange(24).view(2, 12)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = model(ids, use_cache=True)
    caches = [first.past_key_values]
    states = []
    for _ in range(2):
        states.append([w.clone() for w in unpack_state(caches[0].layers[1].recurrent("memory").state).weights])
        model(ids, past_key_values=caches[0])
    assert all(not torch.allclose(a, b) for a, b in zip(*states, strict=True))
    assert all(not torch.allclose(w[0], w[1]) for w in states[0])  # each row has its own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(ids, use_cache=True).logits, first.logits)  # what was learnt is not in the model


@torch.no_grad()
def test_persistent_tokens_are_tokens_before_the_sequence():
    """M(x̃) with x̃ = [p_1 … p_N x]: where the prefix fills whole chunks it might as well be part of the row."""
    mixer = make_mixer("memory")
    mixer.memory.persistent_ND = torch.nn.Parameter(tokens(1, 6, seed=8)[0])
    hidden = tokens(2, 11)
    with_prefix = run_mixer(mixer, hidden)
    prefix = mixer.memory.persistent_ND.expand(2, -1, -1)
    mixer.memory.persistent_ND = None
    assert_close(with_prefix, run_mixer(mixer, torch.cat([prefix, hidden], dim=1))[:, 6:], **CLOSE)
    assert not torch.allclose(with_prefix, run_mixer(mixer, hidden))


def learn_by_the_loop(memory, hidden, state=None):
    """The memory's layer again, in the words of the paper: projections, convolution, SiLU, length 1, recurrence."""
    settings = memory.config.memory
    projected = memory.qkv_proj(hidden)
    if memory.convolution is not None:
        kernel = memory.convolution.weight[:, 0]
        padded = pad(projected, (0, 0, kernel.shape[1] - 1, 0))
        projected = (padded.unfold(1, kernel.shape[1], 1) * kernel).sum(-1) + memory.convolution.bias
    query, key, value = (heads_of(silu(each), settings) for each in projected.chunk(3, -1))
    logits = memory.gate_proj(hidden).view(*hidden.shape[:2], 3, -1) + memory.gate_bias
    theta, eta, alpha = torch.sigmoid(logits).permute(2, 0, 3, 1)
    if state is None:
        weights = tuple(each.expand(len(hidden), -1, -1, -1) for each in memory.start(torch.float64))
        state = MemoryState.start(weights, momentum=True)
    rule = MemoryRule(settings.chunk_size, settings.activation, settings.max_gradient_norm)
    gates = Gates(settings.max_step * theta, eta.log(), (1 - alpha).log())
    result = memory_scan_reference(normalize(query, dim=-1), normalize(key, dim=-1), value, gates, state, rule)
    return memory.read_out(result.read_BHTK, hidden), result


def heads_of(states, settings):
    return states.view(*states.shape[:2], settings.num_heads, -1).transpose(1, 2)


@torch.no_grad()
def test_alone_beside_and_before_attention():
    """LMM: M(x). MAG: Attn(x) ⊗ M(x). MAL: Attn(x + M(x)). The memory by its loop."""
    hidden = tokens(2, 13)
    for kind in ("memory", "memory_gate", "memory_layer"):
        mixer = make_mixer(kind)
        mixer.memory.persistent_ND = None
        remembered, _ = learn_by_the_loop(mixer.memory, hidden)
        if kind == "memory":
            expected = remembered
        elif kind == "memory_gate":
            attended = run_mixer(mixer.attention, hidden)
            product = mixer.product
            expected = product.proj(silu(product.attention_norm(attended)) * silu(product.memory_norm(remembered)))
        else:
            expected = run_mixer(mixer.attention, mixer.norm(hidden + remembered))
        assert_close(run_mixer(mixer, hidden), expected, **CLOSE)


@pytest.mark.parametrize("positions", ["rope", "none"])
@torch.no_grad()
def test_context_attends_to_persistent_tokens_recalled_ones_and_its_segment(positions):
    """MAC: h_t = M(q), y = Attn([P ‖ h ‖ S]) causally, M learns y, o = y ⊗ M(y); segment by segment, in that order."""
    mixer = make_mixer("memory_context", position_embedding_type=positions)
    mixer.query.convolution = mixer.memory.convolution = None
    settings, attention, hidden = mixer.config.memory, mixer.attention, tokens(2, 18)
    state, outputs = None, []
    weights = tuple(each.expand(2, -1, -1, -1) for each in mixer.memory.start(torch.float64))
    for segment in hidden.split(settings.segment_size, dim=1):
        length = segment.shape[1]
        asked = normalize(heads_of(silu(mixer.query.q_proj(segment)), settings), dim=-1)
        recalled = mixer.recall(run_memory(weights, asked, "gelu"), segment)
        both = torch.cat([recalled, segment], dim=1)  # S̃ without P
        query, key, value = (
            projection(states).view(2, states.shape[1], -1, attention.head_dim).transpose(1, 2)
            for projection, states in [
                (attention.q_proj, segment), (attention.k_proj, both), (attention.v_proj, both)
            ]
        )  # fmt: skip
        number = torch.arange(length)
        if positions == "rope":
            query = rotate(query, *rotary_cos_sin(mixer.config, 2 * number[None] + 1, torch.float64))
            places = torch.cat([2 * number, 2 * number + 1])[None]
            key = rotate(key, *rotary_cos_sin(mixer.config, places, torch.float64))
        persistent = attention.persistent
        key = torch.cat([persistent.persistent_key.expand(2, -1, -1, -1), key], dim=2)
        value = torch.cat([persistent.persistent_value.expand(2, -1, -1, -1), value], dim=2)
        seen = (number <= number[:, None]).repeat(1, 2)
        scores = query @ key.transpose(2, 3) * attention.head_dim**-0.5
        weights_TS = scores.masked_fill(~pad(seen, (2, 0), value=True), -torch.inf).softmax(-1)
        attended = attention.o_proj((weights_TS @ value).transpose(1, 2).flatten(2))
        remembered, result = learn_by_the_loop(mixer.memory, attended, state)
        state, weights = result.state, result.state.weights
        state = MemoryState(weights, weights, state.momentum)
        outputs.append(mixer.product(attended, remembered))
    assert_close(run_mixer(mixer, hidden), torch.cat(outputs, dim=1), **CLOSE)


@every_kind
@torch.no_grad()
def test_surprise_is_there_for_whoever_looks(kind):
    """Token by token and as moments; at padding there is none; nobody looking, nothing is computed."""
    model = make_model(kind, memory={**MEMORY, "max_gradient_norm": None})
    ids = torch.arange(20).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    name = "model.layers.1.mixer.memory"
    with record(model, "surprise") as profile, collect_statistics(model) as statistics:
        cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        model(ids[:, 6:], attention_mask=mask, past_key_values=cache)
    surprise = profile[name]
    assert [each.shape for each in profile.calls[name]] == [(2, 6, 2), (2, 4, 2)]
    assert surprise[1].isnan().sum() == 4 * 2 and not surprise[0].isnan().any()
    assert statistics.summary()[name]["surprise_mean"] == pytest.approx(surprise.nanmean().item())
    with record(model, "surprise") as profile:
        model(ids[1:, 4:], use_cache=False)
    assert_close(profile[name][0], torch.cat([surprise[1, :2], surprise[1, 6:]]), **CLOSE)
    memory = model.model.layers[1].mixer.memory
    learned = memory(tokens(1, 3), None, Rows.even(3))
    assert learned.surprise_BTH is None
    if kind == "memory":
        memory.persistent_ND = None
        with record(model, "surprise") as profile:
            hidden = tokens(2, 9)
            run_mixer(model.model.layers[1].mixer, hidden)
        _, result = learn_by_the_loop(memory, hidden)
        assert_close(profile[name], result.surprise_BHT.transpose(1, 2), **CLOSE)


def test_looking_at_surprise_does_not_disturb_gradient_checkpointing():
    """Whose second forward pass comes when nobody looks any more."""
    mixer = make_mixer("memory", memory={**MEMORY, "max_gradient_norm": None})
    hidden = tokens(2, 9).requires_grad_()
    with record(mixer, "surprise") as profile:
        output = checkpoint(lambda states: run_mixer(mixer, states), hidden, use_reentrant=False)
    output.square().sum().backward()
    assert profile["memory"].shape == (2, 9, 2)
    again = hidden.detach().requires_grad_()
    run_mixer(mixer, again).square().sum().backward()
    assert torch.equal(hidden.grad, again.grad)


def test_a_fresh_memory_learns_in_small_steps_and_forgets_little():
    model = MMaDAForCausalLM(MMaDAConfig(mixer_types="memory", num_hidden_layers=1))
    memory = model.model.layers[0].mixer.memory
    gates = memory._gates(torch.zeros(1, 1, 192), torch.float32)
    assert_close(gates.step, torch.full((1, 4, 1), 0.3 * 0.119203))
    assert_close(gates.log_momentum.exp(), torch.full((1, 4, 1), 0.880797))
    assert_close(gates.log_keep.exp(), torch.full((1, 4, 1), 1 - 0.017986))
    shapes = {name: tuple(p.shape) for name, p in memory.start.named_parameters()}
    assert shapes == {"weight_0": (4, 64, 128), "weight_1": (4, 128, 64)}
    assert memory.start.weight_1.std().item() == pytest.approx(0.1 * 128**-0.5, rel=0.05)
    assert memory.persistent_ND.shape == (4, 192)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "memory.depth=0 is too small; use 1 or more"),
        ({"gate": "harder"}, "memory.gate='harder' is unknown; use one of continuous, hard, soft"),
        ({"activation": "relu"}, "memory.activation='relu' is unknown; use one of gelu, silu"),
        ({"max_gradient_norm": 0}, "memory.max_gradient_norm=0 is not positive; use 2 or null, say"),
        ({"segment_size": 0}, "memory.segment_size=0 is too small; use 1 or more"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(settings, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        MMaDAConfig(mixer_types="memory_gate", memory=settings)
    MMaDAConfig(mixer_types="attention", memory=settings)  # built nowhere, asked of nobody
