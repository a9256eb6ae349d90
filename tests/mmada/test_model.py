"""The whole model as a transformers user meets it: decoding, padding, packing, saving, checkpointing."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mmada.model import MMaDAForCausalLM
from mmada.presets import PRESETS, build_config
from mmada.tokenizer import ByteTokenizer
from mmada.training.objectives.router import router_losses


def make_model(dtype=torch.float32, attention="sdpa", **overrides):
    torch.manual_seed(0)
    config = build_config("debug", initializer_range=0.2, **overrides)
    return MMaDAForCausalLM._from_config(config, attn_implementation=attention, dtype=dtype).eval()


def ids(batch, length, seed=1):
    return torch.randint(8, 264, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_equals_the_full_forward(attention):
    model, tokens = make_model(torch.float64, attention), ids(2, 23)
    full = model(tokens).logits
    cache, pieces = None, []
    for begin, end in [(0, 7), (7, 8), (8, 9), (9, 17), (17, 23)]:  # token by token, and in chunks
        output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert_close(torch.cat(pieces, dim=1), full, rtol=1e-6, atol=1e-9)


def test_left_padded_batch_equals_single_prompts():
    model, lengths = make_model(), [5, 9, 12]
    prompts = [ids(1, n, seed=n) for n in lengths]
    padded = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros(3, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 12 - prompt.shape[1] :] = prompt
        mask[row, 12 - prompt.shape[1] :] = 1
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert torch.equal(together[row, 12:], alone[0, prompt.shape[1] :])


def test_packed_documents_do_not_see_each_other():
    model, a, b = make_model(torch.float64), ids(1, 6, seed=2), ids(1, 9, seed=3)
    positions = torch.cat([torch.arange(6), torch.arange(9)])[None]
    packed = model(torch.cat([a, b], dim=1), position_ids=positions).logits  # with the default use_cache, too
    assert_close(packed[:, :6], model(a).logits, rtol=1e-6, atol=1e-9)
    assert_close(packed[:, 6:], model(b).logits, rtol=1e-6, atol=1e-9)


def test_a_document_that_begins_behind_a_filled_cache_is_refused():
    model, tokens = make_model(), ids(1, 9)
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids start again inside a row, behind 4 tokens in the cache"):
        model(tokens[:, 4:], position_ids=torch.tensor([[4, 5, 0, 1, 2]]), past_key_values=cache)
    model(tokens[:, 4:], position_ids=torch.arange(4, 9)[None], past_key_values=cache)


def test_a_token_changes_nothing_before_it():
    model, tokens = make_model(), ids(1, 15)
    changed = tokens.clone()
    changed[0, 9] = 8 + (changed[0, 9] + 1) % 200
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_gradient_checkpointing_gives_the_same_gradients_bit_for_bit():
    """With the router's noise on: the second forward must meet the noise of the first."""
    tokens, gradients = ids(2, 16), []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, sample_ids=torch.tensor([5, 6]), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_is_trained():
    model, tokens = make_model().train(), ids(4, 16)
    model(tokens, labels=tokens, sample_ids=torch.arange(4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_splitting_a_batch_changes_neither_noise_nor_loss():
    """Two workers with a row each, their gradients averaged, and one worker with both rows."""
    tokens, model = ids(2, 16), make_model(torch.float64).train()
    targets, uses = 2 * 15, []
    model.reduce_load = lambda use: uses.append(use) or use
    whole = model(tokens, labels=tokens, sample_ids=torch.tensor([3, 4]), num_items_in_batch=targets)
    whole.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.reduce_load = lambda use: uses[0]
    for row in range(2):
        part = model(
            tokens[row : row + 1],
            labels=tokens[row : row + 1],
            sample_ids=torch.tensor([3 + row]),
            num_items_in_batch=targets / 2,
        )
        (part.loss / 2).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)


def test_the_loss_is_the_language_models_in_evaluation_and_the_sum_in_training():
    model, tokens = make_model(torch.float64), ids(2, 12)
    output = model(tokens, labels=tokens)
    logits = output.logits[:, :-1].flatten(0, 1)
    assert_close(output.loss, torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten()))
    assert output.aux_loss is None
    trained = model.train()(tokens, labels=tokens, sample_ids=torch.arange(2))
    parts = trained.lm_loss + 0.01 * trained.aux_loss + 0.001 * trained.z_loss
    assert_close(trained.loss.detach(), parts, check_dtype=False)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_padding_counts_for_nothing_in_the_routers_losses(scope):
    """Nor does a row of nothing else, and a batch of it has no loss that is no number."""
    model = make_model(torch.float64, router_balance_scope=scope, router_noise=False).train()
    tokens, mask = ids(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[1, 3], mask[2] = 0, 0, 0
    padded = model(tokens, attention_mask=mask, labels=tokens.where(mask == 1, -100))
    rows = [model(tokens[row : row + 1, mask[row].bool()]).router_logits for row in range(2)]
    joined = [torch.cat(layers) for layers in zip(*rows, strict=True)]
    losses = router_losses(joined, 2, [None] * len(joined), [7, 11, 0], scope, None)
    assert_close((padded.aux_loss, padded.z_loss), (losses.balance.detach(), losses.z.detach()))
    assert torch.equal(padded.expert_load, losses.load) and losses.load[0].sum() == 2 * 18
    assert_close(padded.source_balance, losses.source_balance)
    nothing = model(tokens[2:], attention_mask=mask[2:], labels=tokens[2:])
    assert nothing.aux_loss == 0 and nothing.z_loss == 0 and nothing.loss.isfinite()


def test_noise_differs_by_row_and_by_seed():
    from mmada.data import sample_ids

    model, tokens = make_model().train(), ids(1, 12).expand(2, -1)
    routed = []
    for seed in (0, 7, 2**32 - 1):
        output = model(tokens, sample_ids=torch.from_numpy(sample_ids(seed, 5, 2)))
        routed += output.router_logits[0].chunk(2)
    assert all(not torch.equal(a, b) for i, a in enumerate(routed) for b in routed[:i])


def test_labels_and_shifted_labels_agree():
    model, tokens = make_model(), ids(2, 12)
    shifted = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert_close(model(tokens, labels=tokens).loss, model(tokens, shift_labels=shifted).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_of_loss_free_balancing_stays_in_float32(dtype):
    gate = make_model(router_bias_update_rate=0.001).model.layers[1].mlp.gate
    gate.e_score_correction_bias.fill_(0.501)
    gate.to(dtype)
    assert gate.weight.dtype == dtype and gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(gate.e_score_correction_bias, torch.full_like(gate.e_score_correction_bias, 0.501))


def test_loss_free_balancing_moves_the_bias_towards_idle_experts():
    model = make_model(router_bias_update_rate=0.1)
    model.update_router_bias(torch.tensor([[10.0, 0.0, 4.0, 2.0]]))
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.1]))
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in model.state_dict()
    assert not any("e_score" in name for name in make_model().state_dict())


def test_saving_and_loading_through_the_auto_classes(tmp_path):
    model, tokens = make_model(), ids(1, 9)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    ByteTokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MMaDAForCausalLM) and not loaded.training
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    assert AutoTokenizer.from_pretrained(tmp_path)("héé").input_ids == ByteTokenizer()("héé").input_ids
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(eager(tokens, output_attentions=True).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_hidden_states_attentions_and_router_logits_can_be_had():
    output = make_model(attention="eager")(ids(2, 7), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (2, 7, 64)
    assert len(output.attentions) == 2 and output.attentions[0].shape == (2, 4, 7, 7)
    assert len(output.router_logits) == 1 and output.router_logits[0].shape == (14, 4)


def test_a_deep_copy_trains_by_itself():
    model, tokens = make_model().train(), ids(2, 8)
    model(tokens, labels=tokens, sample_ids=torch.arange(2))
    twin = copy.deepcopy(model)
    assert_close(twin(tokens, labels=tokens, sample_ids=torch.arange(2)).loss,
                 model(tokens, labels=tokens, sample_ids=torch.arange(2)).loss)  # fmt: skip


def test_without_experts_nothing_of_them_is_left():
    model = make_model(num_experts=0)
    assert not [name for name in model.state_dict() if "expert" in name or "gate." in name or "tap" in name]
    tokens = ids(1, 6)
    assert model.train()(tokens, labels=tokens).aux_loss is None


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_have_the_size_of_their_name(preset):
    from mmada.model import count_parameters

    # The three large ones: within 3 % of the Gemma 3 language models of the same widths.
    expected = {
        "debug": (116_032, 91_456),
        "tiny": (4_288_704, 1_634_496),
        "1b": (999_812_736, 999_812_736),
        "4b": (3_879_907_840, 3_879_907_840),
        "12b": (11_765_395_200, 11_765_395_200),
    }
    assert count_parameters(build_config(preset)) == expected[preset]
