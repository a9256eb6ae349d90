"""The gated hybrid in each fusion, with and without slots: its formula, its start, its state in all uses."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.cache import MMaDACache
from mmada.nn.mixers.hybrid import GatedHybrid, RoutedHybrid
from mmada.nn.mixers.registry import build_mixer
from mmada.nn.observing import collect_statistics
from mmada.presets import build_config
from tests.mmada.nn.layers import make_context, run_mixer

WIDTH = 16
EXACT = {"rtol": 1e-6, "atol": 1e-9}
FUSIONS = ("residual", "source", "routed")
KINDS = [(fusion, slots) for fusion in FUSIONS for slots in (0, 3)]


def make_config(fusion="residual", slots=3, attention="attention", **overrides):
    hybrid = {"fusion": fusion, "memory_slots": slots, "memory_chunk_size": 4, "attention": attention}
    settings = {
        "vocab_size": 40,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "mixer_types": "hybrid",
        "hybrid": hybrid,
        "ssm": {"state_size": 4, "head_dim": 8, "chunk_size": 8},
        "sliding_window": 3,
    }
    config = MMaDAConfig(**{**settings, **overrides})
    config._attn_implementation = "sdpa"
    return config


def make_model(*args, **settings):
    """A fresh one, as a user gets it."""
    torch.manual_seed(0)
    return MMaDAForCausalLM._from_config(make_config(*args, **settings), attn_implementation="sdpa").double()


def make_hybrid(*args, **settings):
    """One layer with all of its parts awake: every weight random, the router sending tokens both ways."""
    layer = make_model(*args, **settings).model.layers[0].mixer.eval()
    for name, parameter in layer.named_parameters():
        if "ssm." not in name:
            nn.init.normal_(parameter, std=0.4)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return layer


def tokens(batch, length, seed=1):
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("slots", [0, 3])
def test_a_fresh_residual_hybrid_is_plain_attention_to_the_bit(slots):
    model = make_model("residual", slots)
    plain = MMaDAForCausalLM._from_config(make_config(mixer_types="attention"), attn_implementation="sdpa").double()
    weights = {name.replace("mixer.attention.", "mixer."): value for name, value in model.state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    ids = torch.randint(0, 40, (2, 11))
    outputs = [each.train()(ids, labels=ids) for each in (model, plain)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    gradients = {name.replace("mixer.attention.", "mixer."): p.grad for name, p in model.named_parameters()}
    assert all(torch.equal(gradients[name], p.grad) for name, p in plain.named_parameters())


def test_a_fresh_residual_hybrid_moves_its_opening_first_and_then_everything():
    model, ids = make_model("residual", 3).train(), torch.randint(0, 40, (2, 11))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    asleep = []
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        names = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        asleep.append(names)
        optimizer.step()
    recurrent = [name for name, _ in model.named_parameters() if "mixer.recurrent" in name or "mixer.gate" in name]
    assert sorted(asleep[0]) == sorted(recurrent)
    assert asleep[1] == []


@pytest.mark.parametrize("fusion", ["residual", "source"])
def test_the_gate_is_its_formula_by_value_and_gradient(fusion):
    layer, hidden, direction = make_hybrid(fusion), tokens(2, 13), tokens(2, 13, seed=2)
    context = make_context(layer.config, 2, 13)
    results = []
    for form in ("layer", "formula"):
        own = hidden.clone().requires_grad_()
        layer.zero_grad()
        if form == "layer":
            output, _ = layer(own, context, None)
        else:
            attended, _ = layer.attention(own, context, None)
            ssm, _ = layer.recurrent.ssm(own, context, None)
            carried = ssm + layer.recurrent.memory(own, context, None)
            gate = 1 / (1 + torch.exp(-(own @ layer.gate.weight.T + layer.gate.bias)))
            if fusion == "residual":
                output = attended + torch.tanh(layer.opening) * gate * carried
            else:
                output = (1 - gate) * attended + gate * carried
        (output * direction).sum().backward()
        results.append([output, own.grad, *(p.grad.clone() for p in layer.parameters())])
    for mine, formula in zip(*results, strict=True):
        assert_close(mine, formula, **EXACT)


@pytest.mark.parametrize("slots", [0, 3])
def test_routed_tokens_see_the_tokens_of_their_side_only_by_value_and_gradient(slots):
    layer, hidden, direction = make_hybrid("routed", slots), tokens(1, 17), tokens(1, 17, seed=2)
    whole = make_context(layer.config, 1, 17)
    results = []
    for form in ("layer", "formula"):
        own = hidden.clone().requires_grad_()
        layer.zero_grad()
        if form == "layer":
            output, _ = layer(own, whole, None)
        else:
            probability = torch.sigmoid(own @ layer.gate.weight.T + layer.gate.bias)[0]
            carried = probability[:, 0] > 0.5
            output = torch.zeros_like(own)
            for side in (False, True):
                columns = torch.nonzero(carried == side).flatten()
                context = make_context(layer.config, 1, len(columns))
                context.rotary = tuple(each[:, columns] for each in whole.rotary)
                taken = own[:, columns]
                scale = probability[columns] if side else 1 - probability[columns]
                mixed, _ = (layer.recurrent if side else layer.attention)(taken, context, None)
                output = output.index_add(1, columns, scale * mixed)
            assert 3 < carried.sum() < 14
        (output * direction).sum().backward()
        results.append([output, own.grad, *(p.grad.clone() for p in layer.parameters())])
    for mine, formula in zip(*results, strict=True):
        assert_close(mine, formula, **EXACT)


def send_all_to(layer, side):
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(50.0 if side == "recurrent" else -50.0)


@pytest.mark.parametrize("side", ["attention", "recurrent"])
def test_the_side_that_nobody_takes_is_called_for_nothing_and_in_decoding_not_at_all(side):
    layer, hidden, calls, cache = make_hybrid("routed"), tokens(2, 6), [], MMaDACache(1)
    send_all_to(layer, side)
    taken, other = (getattr(layer, name) for name in (side, "recurrent" if side == "attention" else "attention"))
    other.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    output = run_mixer(layer.train(), hidden)
    assert_close(output, taken(hidden, make_context(layer.config, 2, 6), None)[0], **EXACT)
    output.sum().backward()
    idle = {name: p.grad for name, p in other.named_parameters()}
    assert all(gradient is not None and gradient.abs().max() == 0 for gradient in idle.values())
    assert torch.equal(run_mixer(layer.eval(), hidden[:, :4], cache=cache), output[:, :4])
    assert calls == [1, 1]  # a column, whose output counts for nothing
    assert_close(run_mixer(layer, hidden[:, 4:], cache=cache), output[:, 4:], **EXACT)
    assert calls == [1, 1]


@pytest.mark.parametrize("attention", ["attention", "window"])
@pytest.mark.parametrize(("fusion", "slots"), KINDS)
def test_decoding_in_ragged_pieces_equals_single_rows_at_once(fusion, slots, attention):
    layer, hidden = make_hybrid(fusion, slots, attention), tokens(3, 30)
    cache, seen, outputs = MMaDACache(1), [0, 0, 0], [[], [], []]
    for lengths in ([5, 0, 1], [1, 1, 1], [1, 1, 1], [0, 9, 4], [3, 2, 7], [1, 1, 1]):
        new = torch.full((3, max(lengths), WIDTH), 9.0, dtype=torch.float64)
        for row, length in enumerate(lengths):
            new[row, :length] = hidden[row, seen[row] : seen[row] + length]
        output = run_mixer(layer, new, cache=cache, lengths=lengths)
        assert output.isfinite().all()
        for row, length in enumerate(lengths):
            outputs[row].append(output[row, :length])
            seen[row] += length
    for row in range(3):
        alone = run_mixer(layer, hidden[row : row + 1, : seen[row]])
        assert_close(torch.cat(outputs[row]), alone[0], **EXACT)


@pytest.mark.parametrize(("fusion", "slots"), KINDS)
def test_documents_do_not_see_each_other(fusion, slots):
    layer, a, b = make_hybrid(fusion, slots), tokens(1, 6), tokens(1, 9, seed=2)
    packed = run_mixer(layer, torch.cat([a, b], dim=1), documents=torch.tensor([[0] * 6 + [1] * 9]))
    assert_close(packed, torch.cat([run_mixer(layer, a), run_mixer(layer, b)], dim=1), **EXACT)


@pytest.mark.parametrize("attention", ["attention", "window"])
@pytest.mark.parametrize(("fusion", "slots"), KINDS)
def test_cropped_reordered_and_selected_rows_go_on_as_if_fed_alone(fusion, slots, attention):
    layer, hidden, more = make_hybrid(fusion, slots, attention), tokens(3, 14), tokens(2, 6, seed=2)
    cache = MMaDACache(1)
    cache.activate_past_recording()
    run_mixer(layer, hidden[:, :6], cache=cache)
    cache.crop(0)
    for begin, end in ((6, 11), (11, 12), (12, 14)):
        run_mixer(layer, hidden[:, begin:end], cache=cache)
    cache.crop(-5)
    cache.crop(0)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    after = torch.cat([run_mixer(layer, more[:, :1], cache=cache), run_mixer(layer, more[:, 1:], cache=cache)], dim=1)
    assert_close(after, run_mixer(layer, torch.cat([hidden[[2, 0], :9], more], dim=1))[:, 9:], **EXACT)


@pytest.mark.parametrize(("fusion", "slots"), KINDS)
def test_a_token_changes_nothing_before_it(fusion, slots):
    """To the bit; where it makes a routed token change sides, matrices of other sizes may round the others anew."""
    layer, hidden = make_hybrid(fusion, slots), tokens(2, 25)
    before, sides = run_mixer(layer, hidden), layer.gate(hidden) > 0.5
    for t in range(1, 25, 3):
        for factor in (0.9, -1):
            changed = hidden.clone()
            changed[:, t] *= factor
            after = run_mixer(layer, changed)
            if fusion == "routed" and not torch.equal(layer.gate(changed) > 0.5, sides):
                assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-14)
            else:
                assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.isclose(after[:, t], before[:, t], rtol=1e-6).all()


@pytest.mark.parametrize(("fusion", "slots"), KINDS)
def test_every_parameter_is_trained_and_recomputation_changes_no_bit(fusion, slots):
    ids, gradients = torch.randint(0, 40, (2, 16)), []
    for recompute in (False, True):
        model = make_model(fusion, slots, initializer_range=0.3).train()
        for layer in model.model.layers:
            if fusion == "residual":
                nn.init.ones_(layer.mixer.opening)
            if fusion == "routed":
                nn.init.zeros_(layer.mixer.gate.bias)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    plain, recomputed = gradients
    assert [name for name, gradient in plain.items() if gradient is None or gradient.abs().max() == 0] == []
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_generating_with_a_cache_in_half_precision_equals_generating_without(fusion):
    model = make_model(fusion, initializer_range=0.3).eval()
    ids = torch.randint(0, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    texts = [
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=cached)
        for cached in (False, True)
    ]
    assert torch.equal(*texts)
    output = model.bfloat16()(ids, attention_mask=mask)
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()


def test_attention_weights_are_those_of_layers_that_see_all_tokens():
    ids, mask = torch.randint(0, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    for fusion, layers in (("residual", 2), ("routed", 0)):
        model = make_model(fusion, initializer_range=0.3).eval()
        model.set_attn_implementation("eager")
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions
        assert [tuple(each.shape) for each in weights] == [(2, 2, 9, 9)] * layers


def test_the_registry_builds_the_layer_of_the_fusion_with_the_gates_bias():
    for fusion, kind, width in (
        ("residual", GatedHybrid, WIDTH),
        ("source", GatedHybrid, WIDTH),
        ("routed", RoutedHybrid, 1),
    ):
        assert isinstance(build_mixer(make_config(fusion), 0), kind)
        gate = make_model(fusion).model.layers[1].mixer.gate
        assert_close(gate.bias.detach(), torch.full((width,), -0.3).double())
    assert build_mixer(make_config("residual", 0), 0).recurrent.memory is None
    for wrong, said in (
        ({"fusion": "seed"}, r"hybrid\.fusion='seed' is unknown; use one of residual, source, routed"),
        ({"memory_chunk_size": 0}, r"hybrid\.memory_chunk_size=0 is too small; use 1 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            build_config("debug", mixer_types="hybrid", hybrid=wrong)


def test_statistics_of_gates_and_routes():
    layer, hidden = make_hybrid("source"), tokens(2, 9)
    with collect_statistics(layer) as statistics:
        run_mixer(layer, hidden, lengths=[9, 4])
    gate = torch.cat([layer.gate(hidden[0]), layer.gate(hidden[1, :4])])
    summary = statistics.summary()
    assert summary[""]["gate_mean"] == pytest.approx(gate.mean().item())
    assert summary[""]["gate_std"] == pytest.approx(gate.std(correction=0).item())
    assert 1 <= summary["recurrent.memory"]["effective_slots"] <= 3
    routed = make_hybrid("routed")
    with collect_statistics(routed) as statistics:
        run_mixer(routed, hidden, lengths=[9, 4])
    share = (torch.cat([routed.gate(hidden[0]), routed.gate(hidden[1, :4])]) > 0.5).double().mean()
    assert statistics.summary()[""]["recurrent_share_mean"] == pytest.approx(share.item())
