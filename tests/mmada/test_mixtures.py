"""Every mixture of layers computes the same, however its tokens reach it: at once, in pieces, padded, packed."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from mmada.nn.cache import MMaDACache
from tests.mmada.mixtures import every_mixture, is_patched, make_mixture, random_ids

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
# Rows of 11 columns, 1 for a token: whole, padded left and right, with holes, and of a single token.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    ]
)


def feed(model, tokens, cuts, **kwargs):
    """Logits of ``tokens`` (B, T) fed in pieces that end at ``cuts``, and the cache."""
    cache, pieces = None, []
    for begin, end in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True):
        output = model(tokens[:, begin:end], past_key_values=cache, use_cache=True, **kwargs)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1), cache


@every_mixture
@torch.no_grad()
def test_decoding_in_pieces_equals_one_forward_pass(name):
    model, tokens = make_mixture(name), random_ids(2, 15)
    full = model(tokens, use_cache=False).logits
    for cuts in (range(1, 15), [7, 8, 9, 13], [1, 6, 14]):
        logits, cache = feed(model, tokens, cuts)
        assert_close(logits, full, **CLOSE)
    assert cache.get_seq_length() == 15 and cache.num_bytes() > 0


@every_mixture
@torch.no_grad()
def test_padding_anywhere_changes_no_token(name):
    model, tokens = make_mixture(name), random_ids(*MASK.shape)
    padded = model(tokens.where(MASK == 1, 0), attention_mask=MASK, output_hidden_states=True)
    assert padded.logits.isfinite().all()
    for row, mask in enumerate(MASK.bool()):
        alone = model(tokens[row : row + 1, mask], output_hidden_states=True)
        assert_close(padded.logits[row : row + 1, mask], alone.logits, **CLOSE)
        if is_patched(name):
            continue
        for states, expected in zip(padded.hidden_states, alone.hidden_states, strict=True):
            assert_close(states[row : row + 1, mask], expected, **CLOSE)


@every_mixture
@torch.no_grad()
def test_padded_rows_are_decoded_like_single_ones(name):
    """In pieces, too, with padding inside later pieces and rows that get nothing new in one."""
    model, tokens = make_mixture(name), random_ids(*MASK.shape)
    cache, pieces = MMaDACache(model.config.num_hidden_layers), []
    for begin, end in [(0, 4), (4, 5), (5, 9), (9, 10), (10, 11)]:
        output = model(tokens[:, begin:end], attention_mask=MASK[:, :end], past_key_values=cache)
        pieces.append(output.logits)
    logits = torch.cat(pieces, dim=1)
    more = random_ids(MASK.shape[0], 2, seed=2)
    after = model(more, attention_mask=torch.cat([MASK, torch.ones_like(more)], dim=1), past_key_values=cache).logits
    for row, mask in enumerate(MASK.bool()):
        alone = model(torch.cat([tokens[row, mask], more[row]])[None]).logits
        assert_close(logits[row : row + 1, mask], alone[:, :-2], **CLOSE)
        assert_close(after[row : row + 1], alone[:, -2:], **CLOSE)


@every_mixture
def test_padding_changes_neither_loss_nor_gradient(name):
    model, tokens = make_mixture(name, router_noise=False), random_ids(3, 9)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
    # The token after left padding is predicted by a padding column, which a single row does not have.
    ignored = tokens.where(mask == 1, -100)
    ignored[1, 4] = -100
    batch = model(tokens, attention_mask=mask, labels=ignored, num_items_in_batch=17, use_cache=False)
    batch.loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row in range(3):
        own = tokens[row : row + 1, mask[row].bool()]
        model(own, labels=own, num_items_in_batch=17, use_cache=False).loss.backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:
            assert_close(gradients[key], parameter.grad, rtol=1e-5, atol=1e-8)


@every_mixture
def test_packed_documents_are_as_good_as_rows_of_their_own(name):
    model, lengths = make_mixture(name), [4, 1, 7]
    rows = [random_ids(1, length, seed=length) for length in lengths]
    packed = torch.cat([*rows, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    positions = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(3, dtype=torch.long)])[None]
    mask = torch.cat([torch.ones(1, 12), torch.zeros(1, 3)], dim=1)
    direction = torch.randn(1, 12, 264, dtype=torch.float64)
    results = []
    for run in (
        lambda: torch.cat([model(row, use_cache=False).logits for row in rows], dim=1),
        lambda: model(packed[:, :12], position_ids=positions[:, :12]).logits,
        lambda: model(packed, position_ids=positions, attention_mask=mask, use_cache=False).logits[:, :12],
    ):
        model.zero_grad(set_to_none=True)
        logits = run()
        (logits * direction).sum().backward()
        # Parts that no document is long enough for may get no gradient or one of zeros.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        results.append((logits.detach(), gradients))
    for logits, gradients in results[1:]:
        assert_close(logits, results[0][0], **CLOSE)
        assert_close(gradients, results[0][1], rtol=1e-5, atol=1e-8)


def test_a_cache_of_packed_documents_neither_grows_nor_shrinks():
    """A token behind them would see them all in some layers and only the last in others."""
    model, tokens = make_mixture("hybrid"), random_ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    cache = model(tokens, position_ids=positions, use_cache=True).past_key_values
    for use in (lambda: model(tokens[:, :1], past_key_values=cache), lambda: cache.crop(-1)):
        with pytest.raises(ValueError, match="several documents; give each document a row of its own"):
            use()
    cache.reset()
    assert_close(model(tokens, past_key_values=cache).logits, model(tokens, use_cache=False).logits, **CLOSE)


@every_mixture
@torch.no_grad()
def test_a_token_changes_nothing_before_it(name):
    model, tokens = make_mixture(name), random_ids(1, 14)
    before = model(tokens).logits
    for position in (3, 8, 13):
        changed = tokens.clone()
        changed[0, position] = 8 + (changed[0, position] + 1) % 200
        after = model(changed).logits
        # How many tokens go together, to a branch or to an expert, changes the rounding of products.
        if "routed" in name or is_patched(name) or model.config.moe_layers:
            assert_close(after[:, :position], before[:, :position], rtol=1e-12, atol=1e-13)
        else:
            assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("name", ["experts", "experts-together"])
@torch.no_grad()
def test_a_token_changes_no_bit_before_it_where_all_experts_take_all_tokens(name):
    model, tokens = make_mixture(name, num_experts_per_tok=4), random_ids(1, 14)
    before, changed = model(tokens).logits, tokens.clone()
    changed[0, 8] = 8 + (changed[0, 8] + 1) % 200
    assert torch.equal(model(changed).logits[:, :8], before[:, :8])


@every_mixture
@torch.no_grad()
def test_tokens_taken_back_leave_no_trace(name):
    """What assisted generation does: feed candidates, take the wrong ones back, go on."""
    model, tokens = make_mixture(name), random_ids(2, 17)
    full = model(tokens).logits
    cache = model(tokens[:, :6], use_cache=True).past_key_values
    cache.activate_past_recording()
    at = 6
    for right, wrong in [(1, 3), (2, 0), (0, 2), (3, 1), (1, 1)]:
        guess = torch.cat([tokens[:, at : at + right], random_ids(2, wrong, seed=9)], dim=1)
        logits = model(guess, past_key_values=cache).logits
        assert_close(logits[:, :right], full[:, at : at + right], **CLOSE)
        cache.crop(-wrong)
        at += right
        assert cache.get_seq_length() == at
    for candidate in (tokens[:, at : at + 1], random_ids(2, 1), random_ids(2, 1)):
        model(candidate, past_key_values=cache)
    cache.crop(-2)  # the wrong ones of an assistant, which makes them one by one
    at += 1
    logits = model(tokens[:, at:], past_key_values=cache).logits
    assert_close(logits, full[:, at:], **CLOSE)


@every_mixture
@torch.no_grad()
def test_rows_of_the_cache_can_be_reordered_repeated_and_selected(name):
    """With rows of different lengths, and with tokens taken back that are yet to be run again."""
    model = make_mixture(name)
    tokens, mask, more = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long), random_ids(4, 3, seed=2)
    mask[1, :3] = 0
    cache = MMaDACache(model.config.num_hidden_layers)
    cache.activate_past_recording()
    model(torch.cat([tokens, random_ids(2, 2)], dim=1), attention_mask=torch.nn.functional.pad(mask, (0, 2), value=1),
          past_key_values=cache)  # fmt: skip
    cache.crop(-2)
    cache.batch_repeat_interleave(3)  # 000111
    cache.batch_select_indices(torch.tensor([0, 3, 4, 1]))  # 0110
    cache.reorder_cache(torch.tensor([1, 0, 3, 2]))  # 1001
    logits = model(more, past_key_values=cache).logits
    for row, origin in enumerate([1, 0, 0, 1]):
        own = torch.cat([tokens[origin, mask[origin].bool()], more[row]])[None]
        assert_close(logits[row : row + 1], model(own).logits[:, -3:], **CLOSE)


@every_mixture
def test_every_parameter_is_trained(name):
    """Within two steps: behind a gate that starts closed no gradient comes through in the first."""
    model, tokens = make_mixture(name, torch.float32).train(), random_ids(4, 16)
    model.apply(model._init_weights)
    optimizer, waiting = torch.optim.AdamW(model.parameters(), lr=1e-3), set()
    waiting = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all("entropy_model" in key for key in frozen)
    for step in range(2):
        optimizer.zero_grad()
        model(tokens, labels=tokens, sample_ids=torch.arange(4) + step, use_cache=False).loss.backward()
        waiting -= {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert not waiting


@every_mixture
def test_gradient_checkpointing_gives_the_same_gradients(name):
    tokens, gradients = random_ids(2, 11), []
    for checkpointing in (False, True):
        model = make_mixture(name).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, sample_ids=torch.tensor([5, 6]), use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_mixture
def test_training_in_half_precision_lowers_the_loss(name):
    model, tokens, losses = make_mixture(name, torch.bfloat16).train(), random_ids(2, 10), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(4):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens, sample_ids=torch.arange(2) + step, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    assert all(p.isfinite().all() for p in model.parameters())


@every_mixture
@torch.no_grad()
def test_half_precision_is_finite_and_close(name):
    """Measured by the spread of the logits, in pieces as well as at once."""
    model, tokens = make_mixture(name, torch.float32), random_ids(2, 12)
    expected = model(tokens).logits
    for dtype, most in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = copy.deepcopy(model).to(dtype)
        for logits in (half(tokens).logits, feed(half, tokens, [5, 6, 11])[0]):
            assert logits.dtype == dtype and logits.isfinite().all()
            error = (logits.float() - expected).pow(2).mean().sqrt() / expected.std()
            # An entropy that is rounded may move the end of a patch.
            assert error < most or model.config.patches.needs_entropy_model


@every_mixture
@torch.no_grad()
def test_attention_weights_stand_at_the_callers_columns(name):
    """In padded rows, and when padded rows are decoded."""
    model, tokens = make_mixture(name, attention="eager"), random_ids(2, 8)
    if is_patched(name) or not model(tokens, output_attentions=True).attentions:
        return
    mask = torch.tensor([[1] * 8, [0, 0, 1, 1, 0, 1, 1, 1]])
    real = mask[1].bool()
    padded = model(tokens, attention_mask=mask, output_attentions=True).attentions
    alone = model(tokens[1:, real], output_attentions=True).attentions
    cache = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    decoded = model(tokens[:, 6:], attention_mask=mask, past_key_values=cache, output_attentions=True).attentions
    for weights, expected, later in zip(padded, alone, decoded, strict=True):
        assert_close(weights[1][:, real][:, :, real], expected[0], **CLOSE)
        assert weights[1][:, real][:, :, ~real].abs().max() == 0
        assert_close(later, weights[:, :, 6:], **CLOSE)


def llama_like(model):
    """transformers' Llama with the weights of a plain model of ours."""
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
              "pad_token_id", "rope_parameters", "attention_bias")  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in shared})).double()
    for module in list(llama.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":  # computes in float32 whatever it gets
                norm = torch.nn.RMSNorm(model.config.hidden_size, eps=model.config.rms_norm_eps, dtype=torch.float64)
                setattr(module, name, norm)
    llama.load_state_dict({key.replace(".mixer.", ".self_attn."): value for key, value in model.state_dict().items()})
    return llama.eval()


@pytest.mark.parametrize("tie", [True, False])
def test_with_every_part_off_it_is_a_plain_transformer(tie):
    """transformers' Llama: key by key (loading is strict), bit for bit, and by gradient."""
    model = make_mixture("attention", tie_word_embeddings=tie, attention_bias=True)
    llama, tokens = llama_like(model), random_ids(2, 13)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    labels = tokens.where(mask == 1, -100)
    labels[1, 4] = -100
    assert torch.equal(model(tokens).logits, llama(tokens).logits)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours = model(tokens, attention_mask=mask, position_ids=positions, labels=labels)
    theirs = llama(tokens, attention_mask=mask, position_ids=positions, labels=labels)
    assert torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    expected = dict(llama.named_parameters())
    for key, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[key.replace(".mixer.", ".self_attn.")].grad, rtol=1e-5, atol=1e-9)
    long = model.generate(tokens[:1], max_new_tokens=12, do_sample=False)
    assert torch.equal(long, llama.generate(tokens[:1], max_new_tokens=12, do_sample=False, eos_token_id=2))


def test_settings_of_parts_that_are_not_built_change_no_bit():
    model, tokens = make_mixture("attention"), random_ids(2, 13)
    settings = {
        "ssm": {"form": "selective_scan", "state_size": 5, "expand": 3},
        "hybrid": {"fusion": "routed", "memory_slots": 3},
        "memory": {"depth": 3, "momentum": False, "num_persistent_tokens": 7},
        "patches": {"size": 7, "local_size": 24, "hash_vocab": 33},
        "sliding_window": 2,
        "window_sizes": [1],
        "sparse_block_size": 2,
        "num_experts": 0,
        "num_experts_per_tok": 1,
        "router_noise": False,
    }
    other = make_mixture("attention", **settings)
    assert {name: each.shape for name, each in other.state_dict().items()} == {
        name: each.shape for name, each in model.state_dict().items()
    }
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert torch.equal(other.train()(tokens).logits, model.train()(tokens).logits)
