"""State-space layers against transformers' Mamba and Mamba-2, and their state against one pass over everything."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from mmada.config import MMaDAConfig
from mmada.model import MMaDAForCausalLM
from mmada.nn.cache import MMaDACache
from mmada.nn.mixers.ssm import SSM
from mmada.presets import build_config
from tests.mmada.nn.layers import run_mixer

FORMS = ("ssd", "selective_scan")
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def make_config(form, **section):
    section = {"form": form, "state_size": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 16, **section}
    return MMaDAConfig(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, mixer_types="ssm", ssm=section)


def make_layer(form):
    torch.manual_seed(0)
    return SSM(make_config(form), 0).double()


def make_oracle(form):
    shared = {"hidden_size": 24, "state_size": 8, "conv_kernel": 4, "expand": 2, "num_hidden_layers": 1}
    if form == "selective_scan":
        return MambaMixer(MambaConfig(**shared, time_step_rank=2), 0).double()
    config = Mamba2Config(**shared, num_heads=6, head_dim=8, n_groups=2, chunk_size=32, layer_norm_epsilon=1e-6)
    return Mamba2Mixer(config, 0).double()


def under_our_names(form, theirs):
    """Tensors of the oracle by our names: its Mamba has x before z, we have z first in both forms."""
    outer = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight")
    ours = {name if name in outer else f"core.{name}": tensor for name, tensor in theirs.items()}
    if form == "selective_scan":
        ours["in_proj.weight"] = torch.cat(ours["in_proj.weight"].chunk(2)[::-1])
    return ours


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 63, 100])
def test_equals_transformers_by_value_and_gradient(form, length, monkeypatch):
    ours, theirs = make_layer(form), make_oracle(form)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(under_our_names(form, theirs.state_dict()))
    states, direction = torch.randn(2, 2, length, 24, dtype=torch.float64)
    own, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    output = run_mixer(ours, own)
    with monkeypatch.context() as patch:  # it computes in float32 otherwise
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch, "float32", torch.float64)
        expected = theirs(other)
    assert_close(output, expected, **CLOSE)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(own.grad, other.grad, **CLOSE)
    gradients = under_our_names(form, {name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        # Of a single token nothing decays.
        assert parameter.grad.abs().max() > 0 or (length == 1 and name == "core.A_log"), name
        assert_close(parameter.grad, gradients[name], **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_one_pass_also_in_rows_of_different_lengths(form):
    layer, lengths = make_layer(form), [40, 23, 31]
    states = torch.randn(3, 40, 24, dtype=torch.float64)
    alone = [run_mixer(layer, states[row : row + 1, :length])[0] for row, length in enumerate(lengths)]
    cache, done = MMaDACache(1), [0, 0, 0]
    for news in ([20, 3, 0], [1, 1, 1], [17, 2, 25], [1, 1, 1], [1, 16, 4]):
        piece = torch.randn(3, max(news), 24, dtype=torch.float64)  # whatever there is behind a row's end
        for row, new in enumerate(news):
            piece[row, :new] = states[row, done[row] : done[row] + new]
        output = run_mixer(layer, piece, cache=cache, lengths=news)
        assert output.isfinite().all()
        for row, new in enumerate(news):
            assert_close(output[row, :new], alone[row][done[row] : done[row] + new], **CLOSE)
            done[row] += new
    assert done == lengths


@pytest.mark.parametrize("form", FORMS)
def test_documents_are_as_rows_of_their_own(form):
    layer, states = make_layer(form), torch.randn(1, 45, 24, dtype=torch.float64)
    documents = torch.tensor([[0] * 17 + [1] + [2] * 2 + [3] * 25])
    packed = run_mixer(layer, states, documents=documents)
    for begin, end in [(0, 17), (17, 18), (18, 20), (20, 45)]:
        assert_close(packed[:, begin:end], run_mixer(layer, states[:, begin:end]), **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_changes_nothing_before_it_and_padding_has_no_gradient(form):
    layer = make_layer(form)
    states = torch.randn(2, 40, 24, dtype=torch.float64, requires_grad=True)
    changed = states.detach().clone()
    changed[:, 25] += 1
    before, after = run_mixer(layer, states), run_mixer(layer, changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])
    run_mixer(layer, states, lengths=[40, 12])[1, :12].sum().backward()
    assert states.grad[1, :12].abs().min() > 0
    assert states.grad[0].abs().max() == states.grad[1, 12:].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_its_state_in_float32(form):
    layer = make_layer(form)
    states = torch.randn(1, 33, 24, dtype=torch.float64)
    exact = run_mixer(layer, states).detach()
    cache = MMaDACache(1)
    output = run_mixer(layer.bfloat16(), states.bfloat16(), cache=cache)
    assert output.dtype == torch.bfloat16
    assert_close(output.double(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
    assert cache.layers[0].recurrent("ssm").state["scan"].dtype == torch.float32


def test_starting_values_are_the_papers():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "mixer_types": "ssm"}
    for form in FORMS:
        section = {"form": form, "head_dim": 1}  # many heads, to see a distribution
        model = MMaDAForCausalLM(MMaDAConfig(**sizes, ssm=section, initializer_range=1.0))
        layer = model.model.layers[0].mixer
        core, weight = layer.core, layer.conv1d.weight
        assert weight.abs().max() <= 0.5 and weight.std() > 0.2 and layer.conv1d.bias.abs().max() == 0
        bias = core.dt_bias if form == "ssd" else core.dt_proj.bias
        log_dt = torch.nn.functional.softplus(bias).log10()
        assert -3.001 < log_dt.min() < -2.8 and -1.2 < log_dt.max() < -0.999
        assert abs(log_dt.mean() + 2) < 0.2 and abs(log_dt.std() - 2 / 12**0.5) < 0.1
        assert torch.equal(core.D, torch.ones_like(core.D))
        if form == "ssd":
            A = core.A_log.exp()
            assert 1 <= A.min() < 2 and 15 < A.max() <= 16 and abs(A.mean() - 8.5) < 1.5
            assert torch.equal(core.norm.weight, torch.ones(128))
        else:
            assert_close(core.A_log.exp(), torch.arange(1.0, 17).expand(128, -1))
            assert core.dt_proj.weight.abs().max() <= 4**-0.5 and core.dt_proj.weight.std() > 0.25


def test_decay_rates_are_marked_as_free_of_weight_decay_after_loading_too(tmp_path):
    config = build_config("debug", mixer_types="ssm", ssm={"form": "selective_scan"})
    model = MMaDAForCausalLM(config)
    model.save_pretrained(tmp_path)
    for each in (model, MMaDAForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        marked = [name for name, p in each.named_parameters() if getattr(p, "_no_weight_decay", False)]
        assert marked == [f"model.layers.{layer}.mixer.core.A_log" for layer in range(2)]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"form": "s4"}, "ssm.form='s4' is unknown; use one of ssd, selective_scan"),
        ({"head_dim": 7}, "ssm.head_dim=7 and ssm.num_groups=2 do not divide the inner width 128"),
        ({"state_size": 0}, "ssm.state_size=0 is too small; use 1 or more"),
        ({"time_step_min": 0.5}, "ssm.time_step_min=0.5 is not between 0 and ssm.time_step_max=0.1"),
        ({"time_step_floor": 0.2}, "ssm.time_step_floor=0.2 is not between 0 and ssm.time_step_max=0.1"),
        ({"expand": 0}, "ssm.expand=0 leaves no width"),
    ],
)
def test_what_cannot_be_built_is_refused(section, said):
    with pytest.raises(ValueError) as refused:
        build_config("debug", mixer_types="ssm", ssm={"num_groups": 2, **section})
    assert said in str(refused.value)


def test_the_state_size_follows_the_form():
    assert [MMaDAConfig(ssm={"form": form}).ssm.state_size for form in FORMS] == [64, 16]
