"""Transformers as experts: one against PyTorch's encoder layer, the mixture against running all of them and masking."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mmada.nn.router import choose_experts, counter_normal
from mmada.nn.transformer_experts import TransformerExpert, TransformerExperts
from mmada.training.objectives.router import smooth_load

D, F, H, E, K = 16, 24, 2, 5, 2
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def make_experts(seed=0, std=0.4, **settings):
    torch.manual_seed(seed)
    experts = TransformerExperts(D, F, E, **{"top_k": K, "num_heads": H} | settings).double()
    for name, parameter in experts.named_parameters():
        if "noise" not in name and "o_proj" not in name.partition("cross_experts")[2]:
            nn.init.normal_(parameter, std=std)
    return experts


def encoder_of(expert):
    """PyTorch's layers with the weights of ours, and the pairs of parameters that hold them."""
    layers, pairs = nn.ModuleList(), []
    for ours in expert.layers:
        theirs = nn.TransformerEncoderLayer(D, H, F, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        layers.append(theirs.double())
        for mine, oracle in (
            (ours.attention_norm, theirs.norm1), (ours.o_proj, theirs.self_attn.out_proj),
            (ours.ffn_norm, theirs.norm2), (ours.up_proj, theirs.linear1), (ours.down_proj, theirs.linear2),
        ):  # fmt: skip
            pairs += [(mine.weight, oracle.weight), (mine.bias, oracle.bias)]
        pairs += [(ours.qkv_proj.weight, theirs.self_attn.in_proj_weight)]
        pairs += [(ours.qkv_proj.bias, theirs.self_attn.in_proj_bias)]
    with torch.no_grad():
        for mine, oracle in pairs:
            oracle.copy_(mine)
    return layers, pairs


def run_encoder(layers, hidden, padding, causal):
    mask = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1) if causal else None
    for layer in layers:
        hidden = layer(hidden, src_mask=mask, src_key_padding_mask=padding)
    return hidden


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_an_expert_equals_pytorchs_encoder_by_value_and_gradient(causal, tokens):
    torch.manual_seed(tokens)
    expert = TransformerExpert(2, D, H, F, causal).double()
    layers, pairs = encoder_of(expert)
    lengths = torch.tensor([tokens, (tokens + 1) // 2])
    valid = torch.arange(tokens)[None] < lengths[:, None]
    hidden = torch.randn(2, tokens, D, dtype=torch.float64)
    direction = torch.randn_like(hidden) * valid[..., None]
    results = []
    for call in (lambda x: expert(x, valid), lambda x: run_encoder(layers, x, ~valid, causal)):
        own = hidden.clone().requires_grad_()
        output = call(own)
        (output * direction).sum().backward()
        results.append([output[valid], own.grad])
    results[0] += [mine.grad for mine, _ in pairs]
    results[1] += [oracle.grad for _, oracle in pairs]
    for mine, oracles in zip(*results, strict=True):
        assert_close(mine, oracles, **EXACT)


@pytest.mark.parametrize("route_by", ["sequence", "token"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_all_experts_on_all_tokens_with_the_others_masked(route_by, causal):
    experts = make_experts(route_by=route_by, causal=causal).eval()
    hidden, lengths = torch.randn(4, 9, D, dtype=torch.float64), torch.tensor([9, 4, 1, 6])
    valid = torch.arange(9)[None] < lengths[:, None]
    direction = torch.randn_like(hidden)

    def dense(x):
        if route_by == "token":
            read = x
        elif causal:
            read = x[:, :1]
        else:
            read = torch.stack([row[:n].mean(0, keepdim=True) for row, n in zip(x, lengths, strict=True)])
        weights, index = choose_experts((read @ experts.gate.weight.T).flatten(0, 1), K)
        weights, index = (each.view(4, -1, K).expand(-1, 9, -1) for each in (weights, index))
        total = torch.zeros_like(x)
        for number, expert in enumerate(experts.experts):
            share = (weights * (index == number)).sum(-1) * valid
            chosen = (index == number).any(-1) & valid
            padding = ~chosen & chosen.any(1, keepdim=True)  # a row in which nobody chose it has no share either
            output = run_encoder(encoder_of(expert)[0], x, padding, causal)
            total = total + torch.where(chosen[..., None], share[..., None] * output, 0)
        return total

    results = []
    for call in (lambda x: experts(x, lengths).hidden_states, dense):
        own = hidden.clone().requires_grad_()
        output = call(own)
        (output * direction).sum().backward()
        results.append((output, own.grad))
    assert len(experts(hidden, lengths).index[valid].unique()) > K
    assert_close(results[0][0], results[1][0], **EXACT)
    assert_close(results[0][1], results[1][1], **EXACT)


@pytest.mark.parametrize("route_by", ["sequence", "token"])
def test_what_nobody_chose_is_not_computed(route_by):
    experts, hidden = make_experts(route_by=route_by).eval(), torch.randn(1, 3, D, dtype=torch.float64)
    used = set(experts(hidden).index.unique().tolist())
    for number in set(range(E)) - used:
        nn.init.constant_(experts.experts[number].layers[0].up_proj.weight, torch.nan)
    assert len(used) < E and torch.isfinite(experts(hidden).hidden_states).all()


def test_in_training_every_parameter_meets_a_gradient():
    """Also those of experts that nobody chose: workers that share parameters must all call the same modules."""
    experts = make_experts(route_by="token", cross_expert_heads=2).train()
    output = experts(torch.randn(1, 2, D, dtype=torch.float64))
    assert len(output.index.unique()) < E
    (output.hidden_states.square().sum() + output.balance_loss).backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())
    for name in ("gate", "noise"):
        assert experts.get_submodule(name).weight.grad.abs().max() > 0


@pytest.mark.parametrize("route_by", ["sequence", "token"])
def test_a_token_changes_nothing_before_it(route_by):
    experts, hidden = make_experts(route_by=route_by, causal=True).eval(), torch.randn(2, 8, D, dtype=torch.float64)
    changed = hidden.clone()
    changed[:, 5] += 1
    before, after = experts(hidden).hidden_states, experts(changed).hidden_states
    assert_close(before[:, :5], after[:, :5], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(before[:, 5], after[:, 5])


@pytest.mark.parametrize("route_by", ["sequence", "token"])
def test_rows_do_not_depend_on_their_batch(route_by):
    """Noise and all: it is a function of the keys."""
    experts = make_experts(route_by=route_by).train()
    nn.init.normal_(experts.noise.weight)
    hidden, keys = torch.randn(3, 6, D, dtype=torch.float64), torch.arange(18)
    whole = experts(hidden, noise_keys_T=keys)
    for row in range(3):
        alone = experts(hidden[row : row + 1], noise_keys_T=keys[6 * row : 6 * row + 6])
        assert torch.equal(alone.index[0], whole.index[row])
        assert_close(alone.hidden_states[0], whole.hidden_states[row], **EXACT)
    other = experts(hidden, noise_keys_T=keys + 100)
    assert not torch.equal(other.weights, whole.weights)
    assert torch.equal(experts.eval()(hidden, noise_keys_T=keys).weights, experts(hidden).weights)


def test_the_choice_is_one_for_a_sequence_and_each_tokens_own():
    hidden = torch.randn(3, 12, D, dtype=torch.float64)
    by_sequence = make_experts(route_by="sequence").eval()(hidden)
    assert torch.equal(by_sequence.index, by_sequence.index[:, :1].expand_as(by_sequence.index))
    by_token = make_experts(route_by="token").eval()(hidden)
    assert not torch.equal(by_token.index, by_token.index[:, :1].expand_as(by_token.index))


def test_cross_expert_attention_starts_as_the_plain_mixture():
    hidden = torch.randn(2, 7, D, dtype=torch.float64)
    plain, crossed = make_experts().eval(), make_experts(cross_expert_heads=2).eval()
    crossed.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(crossed(hidden).hidden_states, plain(hidden).hidden_states)
    nn.init.normal_(crossed.cross_experts.o_proj.weight)
    assert not torch.allclose(crossed(hidden).hidden_states, plain(hidden).hidden_states)


def test_balance_loss_by_value():
    experts, hidden = make_experts(top_k=1, route_by="token"), torch.ones(2, 5, D, dtype=torch.float64)
    assert_close(experts.eval()(hidden).balance_loss.item(), E - 1.0)  # all to one: variance over squared mean
    with torch.no_grad():
        experts.gate.weight.copy_(10 * torch.eye(E, D))
    spread_out = torch.eye(E, D, dtype=torch.float64)[None]  # token t chooses expert t
    assert_close(experts(spread_out, torch.tensor([E])).balance_loss.item(), 0.0)
    padded = nn.functional.pad(spread_out, (0, 0, 0, 3))  # padding chooses, too, and does not count
    assert_close(experts(padded, torch.tensor([E])).balance_loss.item(), 0.0)


def test_in_training_the_loss_is_that_of_the_noisy_gate():
    experts, hidden = make_experts(route_by="token").train(), torch.randn(2, 5, D, dtype=torch.float64)
    nn.init.normal_(experts.noise.weight)
    clean, spread = experts.gate(hidden).flatten(0, 1), nn.functional.softplus(experts.noise(hidden)).flatten(0, 1)
    noisy = clean + spread * counter_normal(torch.arange(10), E, stream=-3)
    weights, index = choose_experts(noisy, K)
    shares = [(weights * (index == number)).sum() for number in range(E)]
    expected = sum(
        values.var(correction=0) / values.mean() ** 2
        for values in (torch.stack(shares), smooth_load(clean, noisy, spread, K))
    )
    output = experts(hidden, noise_keys_T=torch.arange(10))
    assert torch.equal(output.index.flatten(0, 1), index)
    assert_close(output.balance_loss, expected, **EXACT)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_k": 6}, "top_k=6 is not between 1 and num_experts=5"),
        ({"route_by": "batch"}, "route_by='batch' is unknown; use 'sequence' or 'token'"),
        ({"num_heads": 3}, "num_heads=3 does not divide hidden_size=16"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_experts(**settings)
