"""Models with byte patches as a transformers user meets them: decoding, padding, packing, training, saving."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mmada.model import MMaDAForCausalLM
from mmada.nn.observing import collect_statistics
from tests.mmada.nn.patches.byte_models import RULES, make_model, text_ids

CHUNKS = [(0, 1), (1, 2), (2, 9), (9, 10), (10, 11), (11, 12), (12, 19), (19, 31), (31, 32)]


def decoded(model, tokens, chunks=CHUNKS, mask=None, cache=None):
    """Logits of the tokens, fed chunk by chunk."""
    pieces = []
    for begin, end in chunks:
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True, **given)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("rule", RULES)
def test_cached_decoding_equals_the_full_forward(rule):
    model, tokens = make_model(rule), text_ids(3, 32)
    full = model(tokens, use_cache=False)
    assert full.num_patches.min() > 0 and full.num_patches.max() < 32
    assert_close(decoded(model, tokens), full.logits, rtol=1e-6, atol=1e-9)
    by_byte = [(column, column + 1) for column in range(32)]
    assert_close(decoded(model, tokens, by_byte), full.logits, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mixers", ["ssm", "window,attention"])
def test_any_mixer_may_work_on_patches(mixers):
    model, tokens = make_model(mixer_types=mixers, sliding_window=3, ssm={"head_dim": 16}), text_ids(3, 32)
    assert_close(decoded(model, tokens), model(tokens, use_cache=False).logits, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", ["static", "space", "cut"])
def test_padding_anywhere_equals_single_rows(rule):
    model, tokens = make_model(rule, mixer_types="attention,ssm", ssm={"head_dim": 16}), text_ids(3, 32)
    mask = torch.ones(3, 32, dtype=torch.long)
    mask[0, :12] = 0
    mask[1, 27:] = 0
    mask[2, [0, 5, 6, 7, 20]] = 0
    together = model(tokens, attention_mask=mask, use_cache=False).logits
    in_steps = decoded(model, tokens, mask=mask)
    for row in range(3):
        real = mask[row].bool()
        alone = model(tokens[row : row + 1, real], use_cache=False).logits[0]
        assert_close(together[row, real], alone, rtol=1e-6, atol=1e-9)
        assert_close(in_steps[row, real], alone, rtol=1e-6, atol=1e-9)
    assert together.isfinite().all() and in_steps.isfinite().all()


@pytest.mark.parametrize("rule", ["static", "space", "cut"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_equal_single_ones(rule, use_cache):
    model = make_model(rule, mixer_types="attention,ssm", ssm={"head_dim": 16})
    sizes = [9, 1, 2, 20]
    tokens = text_ids(2, 32)
    positions = torch.cat([torch.arange(size) for size in sizes])[None].expand(2, -1)
    packed = model(tokens, position_ids=positions, use_cache=use_cache).logits
    alone = [model(piece, use_cache=False).logits for piece in tokens.split(sizes, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_byte_changes_nothing_before_it(rule):
    """Bit for bit where the number of patches stays: else the matrix products have other shapes."""
    model, tokens = make_model(rule), text_ids(2, 32)
    before = model(tokens, use_cache=False)
    for place in (0, 1, 2, 13, 14, 15, 31):
        changed = tokens.clone()
        changed[:, place] = 8 + 0x41
        after = model(changed, use_cache=False)
        if torch.equal(after.num_patches, before.num_patches):
            assert torch.equal(before.logits[:, :place], after.logits[:, :place])
        assert_close(before.logits[:, :place], after.logits[:, :place], rtol=1e-12, atol=1e-12)
        assert not torch.equal(before.logits[:, place], after.logits[:, place])


def test_a_patch_is_read_one_patch_late():
    """Patches of bytes 0 | 1-3 | 4-6: a byte sees the stack's output for what ended at or before it."""
    model, tokens = make_model("static", num_hidden_layers=1), text_ids(1, 7)
    inputs = []
    model.model.patches.decoder.register_forward_pre_hook(lambda _, given: inputs.append(given[2]))
    model(tokens, use_cache=False)
    assert inputs[0].tolist() == [[0, 0, 0, 1, 1, 1, 2]]


@pytest.mark.parametrize("rule", ["space", "cut"])
def test_rows_of_the_cache_move(rule):
    """Beams change places, rows are repeated and dropped; row i then goes on as what it became."""
    model, tokens = make_model(rule, mixer_types="attention,ssm", ssm={"head_dim": 16}), text_ids(3, 32)
    full = model(tokens, use_cache=False).logits
    cache = model(tokens[:, :14], use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_close(decoded(model, tokens[[2, 0, 0]], [(14, 20)], cache=cache), full[[2, 0, 0], 14:20])
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    rows = [2, 2, 0, 0]
    assert_close(decoded(model, tokens[rows], [(20, 21), (21, 32)], cache=cache), full[rows, 20:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("left", [0, 4])
def test_bytes_can_be_taken_back(rule, left):
    """Bytes that ended patches in one row and not in another, again and again, with padding and without."""
    model, tokens = make_model(rule, mixer_types="attention,ssm", ssm={"head_dim": 16}), text_ids(3, 32)
    mask = torch.ones(3, 32, dtype=torch.long)
    mask[0, :left] = 0
    full = model(tokens, attention_mask=mask, use_cache=False).logits
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    cache.activate_past_recording()
    place = 6
    for right, wrong in ((2, 5), (0, 3), (7, 1), (1, 0), (1, 9), (5, 2)):
        tried = torch.cat([tokens[:, place : place + right], text_ids(3, wrong, seed=place)], dim=1)
        tried = torch.cat([tokens[:, :place], tried], dim=1)
        chunks = [(place, place + right + wrong - 1), (place + right + wrong - 1, place + right + wrong)]
        if right + wrong < 2:
            chunks = chunks[1:]
        seen = decoded(model, tried, chunks, torch.nn.functional.pad(mask, (0, 9), value=1), cache)
        assert_close(seen[:, :right], full[:, place : place + right], rtol=1e-6, atol=1e-9)
        cache.crop(-wrong)
        place += right
    assert_close(decoded(model, tokens, [(place, 32)], mask, cache), full[:, place:], rtol=1e-6, atol=1e-9)


def test_what_was_not_recorded_cannot_be_taken_back():
    model, tokens = make_model(), text_ids(2, 12)
    cache = model(tokens, use_cache=True).past_key_values
    held = cache.num_bytes()
    with pytest.raises(ValueError, match=r"crop\(-1\) takes back bytes.*activate_past_recording"):
        cache.crop(-1)
    assert cache.num_bytes() == held and cache.columns == 12
    cache.crop(0)
    cache.activate_past_recording()
    model(tokens[:, :3], past_key_values=cache, use_cache=True)
    cache.crop(-3)
    with pytest.raises(ValueError, match=r"crop\(-1\)"):
        cache.crop(-1)


def test_the_stack_runs_only_when_a_patch_is_finished():
    model, tokens = make_model("static"), text_ids(2, 20)
    runs = []
    model.model.layers[0].register_forward_hook(lambda _, given, output: runs.append(given[0].shape[1]))
    cache = model(tokens[:, :1], use_cache=True).past_key_values
    for column in range(1, 20):
        model(tokens[:, column : column + 1], past_key_values=cache, use_cache=True)
    assert runs == [1] * 7  # byte 0, and every third after it


def test_only_rows_that_finish_a_patch_go_on():
    model, tokens = make_model(num_hidden_layers=1), text_ids(2, 9)
    tokens[:] = 8 + 0x61
    tokens[1, 5] = 8 + 0x20
    cache = model(tokens[:, :5], use_cache=True).past_key_values
    stack = cache.layers[0].parts["patches"].stack
    model(tokens[:, 5:6], past_key_values=cache, use_cache=True)
    assert stack.lengths_B.tolist() == [1, 2]


def test_the_cache_counts_its_bytes_and_stays_small():
    """What a static model keeps does not grow but for the stack's keys and values: 2 · 2 layers · 32 · 8 bytes each."""
    model, tokens = make_model("static", patches={"encoder_layers": 2}), text_ids(1, 60)
    cache, held = None, []
    for column in range(60):
        cache = model(tokens[:, column : column + 1], past_key_values=cache, use_cache=True).past_key_values
        held.append(cache.num_bytes())
    assert held[-1] - held[29] == 10 * 2 * 2 * 32 * 8
    local = 2 * 4 * 6 * 16 * 8  # keys and values, encoder's and decoder's layers, window, width, bytes
    stack = 2 * 2 * 20 * 32 * 8
    trail = 4 * (8 + 1 + 1 + 16 * 8) + 32 * 8 + 3 * 8  # id, reading, end and state of 4 bytes; one output; counts
    assert held[-1] == local + stack + trail
    cache.reset()
    assert cache.num_bytes() == 0


@pytest.mark.parametrize("rule", ["space", "cut"])
def test_generate_with_left_padding_beams_and_an_assistant(rule):
    model = make_model(rule)
    prompts = [text_ids(1, length, seed=length) for length in (5, 9, 12)]
    padded, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, 12 - prompt.shape[1] :], mask[row, 12 - prompt.shape[1] :] = prompt, 1
    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        together = model.generate(padded, attention_mask=mask, **settings, **more)
        for row, prompt in enumerate(prompts):
            alone = model.generate(prompt, use_cache=False, **settings, **more)
            assert torch.equal(together[row, 12:], alone[0, prompt.shape[1] :])
    helper = make_model("static")
    for more in ({"assistant_model": helper}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assisted = model.generate(prompts[2], **settings, **more)
        assert torch.equal(assisted, model.generate(prompts[2], use_cache=False, **settings))


def test_every_parameter_is_trained_but_the_entropy_models():
    model, tokens = make_model("entropy").train(), text_ids(8, 40)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "entropy_model" in name}
    assert not model.model.patches.entropy_model.training
    model(tokens, labels=tokens).loss.backward()
    for name, p in model.named_parameters():
        if "entropy_model" in name:
            assert p.grad is None and not p.requires_grad and torch.equal(p, frozen[name])
        else:
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients_bit_for_bit():
    tokens, gradients = text_ids(2, 30), []
    for checkpointing in (False, True):
        model = make_model("cut", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, sample_ids=torch.tensor([5, 6]), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_splitting_a_batch_changes_neither_noise_nor_loss(scope):
    """Two workers with a row each, whose patches differ in number, and one worker with both rows."""
    tokens = text_ids(2, 40, seed=2)
    model = make_model(
        num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, router_balance_scope=scope
    ).train()
    model.model.layers[0].router_tap.noise_weight.data.normal_()
    ids, targets, uses = torch.tensor([3, 4]), 2 * 39, []
    model.reduce_load = lambda use: uses.append(use) or use
    whole = model(tokens, labels=tokens, sample_ids=ids, num_items_in_batch=targets)
    assert whole.num_patches[0] != whole.num_patches[1]
    whole.loss.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model.reduce_load = lambda use: uses[0] if use.dim() == 3 else 2 * use
    for row in range(2):
        own = tokens[row : row + 1]
        part = model(own, labels=own, sample_ids=ids[row : row + 1], num_items_in_batch=targets / 2)
        (part.loss / 2).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p, gradient in zip(trained, expected, strict=True):
        assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)


def test_outputs_of_the_stack_are_over_patches():
    model = make_model(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16)
    tokens = text_ids(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    output = model(tokens, attention_mask=mask, output_hidden_states=True)
    assert output.logits.shape == (2, 30, 264)
    most = int(output.num_patches.max())
    assert [states.shape for states in output.hidden_states] == [(2, most, 32)] * 3
    assert output.router_logits[0].shape == (int(output.num_patches.sum()), 3)


def test_saving_and_loading_keeps_the_entropy_model(tmp_path):
    model, tokens = make_model("cut", dtype=torch.float32), text_ids(1, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MMaDAForCausalLM)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert not any(p.requires_grad for p in loaded.model.patches.entropy_model.parameters())
    tied = loaded.model.patches.entropy_model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    twin = copy.deepcopy(loaded).train()
    assert not twin.model.patches.entropy_model.training


def test_off_means_nothing_is_left():
    names = make_model(patches={"mode": "none"}).state_dict()
    assert not [name for name in names if "patches" in name]
    assert names["model.embed_tokens.weight"].shape == (264, 32) and "model.norm.weight" in names


def test_mean_sizes_can_be_observed():
    model, tokens = make_model("static"), text_ids(2, 31)
    with collect_statistics(model) as statistics, torch.no_grad():
        model(tokens, use_cache=False)
    seen = statistics.summary()["model.patches"]
    assert seen == pytest.approx({"bytes_per_patch": 31 / 11, "stack_steps_per_byte": 11 / 31})


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="inputs_embeds cannot be grouped by patches.mode=space"):
        make_model()(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="patches.threshold=null is not known yet"):
        make_model("entropy", patches={"threshold": None})(text_ids(1, 3))
