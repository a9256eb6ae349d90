"""The reward model on every mixture of layers: where it reads, how it is bounded, saved, normalised and taught."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from mmada.errors import DataError
from mmada.model import MMaDAForCausalLM
from mmada.reward_model import COMPONENTS, MMaDARewardModel, RewardHeads, last_states, scored_ids
from mmada.tokenizer import ByteTokenizer
from mmada.training.objectives.reward import RewardWeights, reward_losses
from tests.mmada.mixtures import config_of, every_kind, every_mixture, random_ids
from tests.mmada.test_mixtures import CLOSE, MASK

TOKENIZER = ByteTokenizer()
PROMPTS, COMPLETIONS = ["a question", "b", "another one"], ["yes", "a longer answer", ""]


def reward_model(name: str, dtype=torch.float64, **overrides) -> MMaDARewardModel:
    torch.manual_seed(0)
    model = MMaDARewardModel._from_config(config_of(name, **overrides), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@every_mixture
@torch.no_grad()
def test_padding_anywhere_changes_no_reward(name):
    model, tokens = reward_model(name), random_ids(*MASK.shape)
    padded = model(tokens.where(MASK == 1, 0), attention_mask=MASK)
    assert padded.components.shape == (5, len(COMPONENTS)) and padded.reward.dtype == torch.float64
    for row, mask in enumerate(MASK.bool()):
        alone = model(tokens[row : row + 1, mask])
        for key in ("reward", "confidence", "components"):
            assert_close(padded[key][row : row + 1], alone[key], **CLOSE)


@every_kind
def test_it_is_saved_and_loaded_through_the_auto_class(name, tmp_path):
    model = reward_model(name, torch.float32)
    model.set_normalisation(0.25, 0.5)
    expected = model.score(TOKENIZER, PROMPTS, COMPLETIONS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is MMaDARewardModel and float(loaded.heads.reward_mean) == 0.25
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded.score(TOKENIZER, PROMPTS, COMPLETIONS) == expected


def test_the_reward_is_the_softmax_mixture_of_bounded_components_at_the_last_token():
    model, tokens = reward_model("attention"), random_ids(3, 9)
    with torch.no_grad():
        model.heads.mixture.copy_(torch.tensor([0.0, math.log(2), math.log(3), math.log(4)]))
        output = model(tokens, attention_mask=torch.ones_like(tokens))
        last_BD = model.model(tokens).last_hidden_state[:, -1]
    by_hand = torch.tanh(last_BD @ model.heads.component_weight.T + model.heads.component_bias)
    assert_close(output.components, by_hand)
    assert_close(output.reward, by_hand @ torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    assert output.components.abs().max() < 1


def test_the_last_real_token_is_found_wherever_padding_stands():
    states = torch.arange(5 * 11.0).view(5, 11, 1)
    assert last_states(states, MASK)[:, 0].tolist() == [10, 21, 27, 42, 53]
    assert last_states(states, None)[:, 0].tolist() == [10, 21, 32, 43, 54]


def test_new_heads_are_as_published_and_loaded_trunks_stay():
    """Component weights N(0, 1/(D+1)), everything else 0; the confidence starts at one half."""
    torch.manual_seed(0)
    width = 400
    model = MMaDARewardModel(config_of("attention", hidden_size=width))
    heads: RewardHeads = model.heads
    assert heads.component_weight.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    assert not any(p.any() for p in (heads.component_bias, heads.mixture, heads.confidence_weight))
    assert (model(random_ids(2, 5)).confidence == 0.5).all()


def test_the_trunk_is_that_of_the_language_model():
    language, reward = (kind(config_of("experts")) for kind in (MMaDAForCausalLM, MMaDARewardModel))
    trunk = {name for name in language.state_dict() if name.startswith("model.")}
    heads = {f"heads.{name}" for name in reward.heads.state_dict()}
    assert reward.state_dict().keys() == trunk | heads
    assert reward.expert_parallel_layout() == language.expert_parallel_layout()
    assert reward.gathered_whole == language.gathered_whole


def test_confidence_sends_no_gradient_to_what_it_judges():
    model = reward_model("attention")
    model(random_ids(2, 7)).confidence.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"heads.confidence_weight", "heads.confidence_bias"}
    model(random_ids(2, 7)).reward.sum().backward()
    assert model.heads.mixture.grad.abs().max() > 0 and model.model.embed_tokens.weight.grad.abs().max() > 0


@torch.no_grad()
def test_scores_are_normalised_in_order_and_hang_on_no_neighbour():
    model = reward_model("window", torch.float32).train()
    plain = model.score(TOKENIZER, PROMPTS, COMPLETIONS)
    assert model.training  # as before
    model.set_normalisation(0.1, 0.2)
    found = model.score(TOKENIZER, PROMPTS, COMPLETIONS, batch_size=2)
    for before, after, prompt, completion in zip(plain, found, PROMPTS, COMPLETIONS, strict=True):
        assert after.reward == pytest.approx((before.reward - 0.1) / 0.2, abs=1e-5)
        assert list(after.components) == list(COMPONENTS)
        alone = model.eval()(torch.tensor([scored_ids(TOKENIZER, prompt, completion)]))
        assert before.reward == pytest.approx(alone.reward.item(), abs=1e-5)
        assert before.components["coherence"] == pytest.approx(alone.components[0, 1].item(), abs=1e-5)
    assert model.score(TOKENIZER, [], []) == []


def test_what_cannot_be_scored_is_refused():
    model = reward_model("attention", torch.float32, max_position_embeddings=12)
    with pytest.raises(DataError, match="takes 13 tokens .* max_position_embeddings=12"):
        model.score(TOKENIZER, ["12345678"], ["abc"])
    with pytest.raises(ValueError, match="1 prompts and 2 completions"):
        model.score(TOKENIZER, ["a"], ["b", "c"])


def test_in_training_the_routers_losses_are_for_the_caller_to_add():
    model = reward_model("experts").train()
    output = model(random_ids(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.int64))
    expected = model.config.router_aux_loss_coef * output.aux_loss + model.config.router_z_loss_coef * output.z_loss
    assert_close(output.loss.detach(), expected)
    assert output.expert_load.shape == (1, 4) and output.expert_load.sum() == 2 * 9 * model.config.num_experts_per_tok
    assert model.eval()(random_ids(2, 9)).loss is None


def test_16_bits_in_the_trunk_leave_the_heads_in_32():
    output = reward_model("attention", torch.float32).to(torch.bfloat16)(random_ids(2, 7))
    assert {output[key].dtype for key in ("reward", "confidence", "components")} == {torch.float32}


# What pairs can teach.

WIDTH, WEIGHTS = 12, torch.tensor([0.1, 0.2, 0.3, 0.4])


def pairs_of(count: int, seed: int, *, drawn: bool = False):
    """States of pairs and their true components, (count, 2, ·): the better of the true rewards, which weigh them by
    WEIGHTS, first; or, where preferences are ``drawn``, first with the probability that Bradley and Terry give it."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(len(COMPONENTS), WIDTH, generator=torch.Generator().manual_seed(99)) / 3
    states = torch.randn(count, 2, WIDTH, generator=generator)
    components = torch.tanh(states @ truth.T)
    rewards = components @ WEIGHTS
    if drawn:
        rewards = rewards - torch.log(-torch.log(torch.rand(count, 2, generator=generator)))  # Gumbel's noise
    order = rewards.argsort(dim=1, descending=True)[..., None]
    return states.gather(1, order.expand_as(states)), components.gather(1, order.expand_as(components))


def taught(proxies: float, *, drawn: bool, steps: int = 300) -> RewardHeads:
    torch.manual_seed(0)
    heads = RewardHeads(WIDTH)
    heads.init_own_weights(config_of("attention"))
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.03)
    for step in range(steps):
        states, components = pairs_of(512, step, drawn=drawn)
        reward, confidence, own = heads(states.flatten(0, 1))
        shape = states.shape[:2]
        losses = reward_losses(
            reward.view(shape), confidence.view(shape), own.view(*shape, 4), components, RewardWeights(proxies=proxies)
        )
        optimizer.zero_grad()
        (losses.loss / len(states)).backward()
        optimizer.step()
    return heads


def correlations(heads: RewardHeads) -> tuple[torch.Tensor, float, float]:
    """Of each head with each true component (4, 4), of the rewards with the true ones, and pairs ordered rightly."""
    states, components = pairs_of(4000, 10_000)
    with torch.no_grad():
        reward, _, own = heads(states.flatten(0, 1))
    components = components.flatten(0, 1)
    together = torch.corrcoef(torch.cat([own, components], dim=1).T)
    total = torch.corrcoef(torch.stack([reward, components @ WEIGHTS]))[0, 1]
    reward = reward.view(-1, 2)
    return together[:4, 4:], float(total), float((reward[:, 0] > reward[:, 1]).float().mean())


def test_proxies_tell_the_components_apart_and_totals_do_not():
    matrix, total, right = correlations(taught(proxies=1.0, drawn=True))
    assert matrix.diagonal().min() > 0.98 and total > 0.98 and right > 0.95
    matrix, total, right = correlations(taught(proxies=0.0, drawn=True))
    assert total > 0.94 and right > 0.9  # nearly as good a judge of the whole
    assert matrix.diagonal().max() < 0.5  # and none of its parts


def test_with_totals_alone_components_may_change_places():
    """The same rewards, so the same loss, whichever head is called what: weights cannot tell them apart either."""
    heads, shuffled = RewardHeads(WIDTH), RewardHeads(WIDTH)
    torch.manual_seed(0)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
        for name in ("component_weight", "component_bias", "mixture"):
            getattr(shuffled, name).copy_(getattr(heads, name)[order])
    states = torch.randn(7, WIDTH)
    assert_close(heads(states)[0], shuffled(states)[0])
    assert not torch.allclose(heads(states)[2], shuffled(states)[2])


def test_weights_are_those_of_the_preferences_only_where_these_are_drawn_as_the_loss_assumes():
    """Where the better one always wins, weight goes to whatever tells pairs apart best: it is no measure of what
    whoever made the pairs cares for."""
    drawn, always = (taught(proxies=1.0, drawn=drawn).mixture.softmax(dim=0) for drawn in (True, False))
    assert_close(drawn.detach(), WEIGHTS, atol=0.06, rtol=0)
    assert (always - WEIGHTS).abs().max() > 0.2
