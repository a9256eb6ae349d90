"""Every kernel against the plain formula, and what each promises beside its values: memory, skipping, refusing."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import mmada.nn.attention.blockwise as blockwise_module
from mmada.model import MMaDAForCausalLM
from mmada.nn.attention.choice import choose_kernel
from mmada.nn.attention.scoring import Scoring
from mmada.nn.masks import Visibility
from mmada.presets import build_config
from tests.mmada.nn.attention_layers import KINDS, make_attention, random_states, value_and_gradients
from tests.mmada.nn.layers import make_context, run_mixer

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
CAP = {"attn_logit_softcapping": 1.5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a hundred tokens."""
    monkeypatch.setattr(blockwise_module, "QUERY_BLOCK", 32)
    monkeypatch.setattr(blockwise_module, "KEY_BLOCK", 24)


def documents_of(length):
    return torch.stack([torch.arange(length) // 30, torch.arange(length) // 17])


@pytest.mark.parametrize("position", ["none", "alibi", "relative"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
def test_values_and_gradients_are_the_plain_formulas(kernel, kind, position):
    for length, persistent, extra in ((1, 0, {}), (63, 2, CAP), (100, 0, {}), (128, 2, {})):
        results = []
        for name in ("eager", kernel):
            layer = make_attention(kind, name, num_persistent=persistent, position_embedding_type=position, **extra)
            results.append(value_and_gradients(layer, random_states(2, length)))
        for a, b in zip(*results, strict=True):
            assert_close(b, a, **CLOSE)


@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_the_plain_formulas(kernel, kind):
    results = []
    for name in ("eager", kernel):
        layer = make_attention(kind, name, num_persistent=2, position_embedding_type="relative", **CAP)
        results.append(value_and_gradients(layer, random_states(2, 100), documents=documents_of(100)))
    for a, b in zip(*results, strict=True):
        assert_close(b, a, **CLOSE)


def test_a_query_without_keys_gets_zeros_and_gives_no_gradient():
    """Keys 3, 4 and 5 for the queries 2 and 5."""
    visibility = Visibility(query_BT=torch.tensor([[2, 5]]), num_keys=3, past=2, past_B=torch.tensor([2]), offset=3)
    query, key, value = (random_states(1, 2 * length, 4, seed=seed).view(1, 2, length, 4).requires_grad_()
                         for seed, length in enumerate((2, 3, 3)))  # fmt: skip
    mixed = blockwise_module.blockwise(query, key, value, visibility, Scoring(0.5))
    mixed.sum().backward()
    assert not mixed[:, 0].any() and not query.grad[:, :, 0].any()
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, 1:], key, value)
    assert_close(mixed[:, 1:], expected.transpose(1, 2), **CLOSE)
    assert all(gradient.isfinite().all() for gradient in (query.grad, key.grad, value.grad))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_computes_the_plain_formula(kind):
    for documents, persistent, extra in ((None, 2, CAP), (documents_of(70), 0, {})):
        outputs = []
        for name in ("eager", "flex_attention"):
            layer = make_attention(kind, name, num_persistent=persistent, position_embedding_type="relative", **extra)
            outputs.append(run_mixer(layer, random_states(2, 70), documents=documents))
        assert_close(outputs[1], outputs[0], **CLOSE)


def test_flex_attention_refuses_a_gradient_on_a_cpu():
    with pytest.raises(ValueError, match="attn_implementation=flex_attention has no gradient on a CPU; use blockwise"):
        run_mixer(make_attention(kernel="flex_attention"), random_states(1, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "blockwise", "flex_attention"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_on_a_gpu_compute_the_plain_formula(kind, kernel):
    results = []
    for name in ("eager", kernel):
        layer = make_attention(kind, name, position_embedding_type="alibi", head_dim=16).float().cuda()
        states = random_states(2, 100).float().cuda().requires_grad_()
        context = make_context(layer.config, 2, 100)
        context.device = torch.device("cuda")
        output, _ = layer(states, context)
        (output * random_states(2, 100, seed=2).float().cuda()).sum().backward()
        results.append([output.detach(), states.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert_close(b, a, rtol=1e-3, atol=1e-3)


def kept_bytes(layer, length):
    """What autograd keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run_mixer(layer, random_states(1, length).requires_grad_())
    assert output.requires_grad
    return sum(kept.values())


def test_what_blockwise_attention_keeps_grows_with_the_length_and_eagers_with_its_square():
    lengths = (256, 512)
    eager, blockwise = (
        [kept_bytes(make_attention(kernel=kernel, **CAP), length) for length in lengths]
        for kernel in ("eager", "blockwise")
    )
    assert eager[1] > 3.5 * eager[0]
    assert blockwise[1] < 2.1 * blockwise[0]
    assert 50 * blockwise[1] < eager[1]


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("extra", [{}, CAP, {"attention_normalizer": "sparsemax"}], ids=["plain", "cap", "sparsemax"])
@pytest.mark.parametrize("kind", ["window", "sparse"])
def test_windows_and_sparse_blocks_make_no_tensor_that_grows_with_the_square(kind, extra):
    """Bias and backward pass included."""
    largest = []
    for length in (512, 1024):
        layer = make_attention(kind, "sdpa", position_embedding_type="alibi", **extra)
        with Largest() as mode:
            value_and_gradients(layer, random_states(1, length))
        largest.append(mode.elements)
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("kernel", ["sdpa", "blockwise"])
@pytest.mark.parametrize(("kind", "first_free"), [("window", 64), ("sparse", 24)])
@torch.no_grad()
def test_keys_that_are_not_seen_are_not_touched(kind, first_free, kernel):
    """Not a number anywhere in a product would spread to its result, mask or no mask."""
    layer = make_attention(kind, kernel, sparse_global_blocks=0, sparse_random_blocks=0)
    states = random_states(1, 128)
    poisoned = states.clone()
    poisoned[:, :8] = torch.nan  # the window reaches 5 back, the blocks one block of 8
    expected, output = run_mixer(layer, states), run_mixer(layer, poisoned)
    assert output[:, :8].isnan().all()
    assert_close(output[:, first_free:], expected[:, first_free:], **CLOSE)
    eager = run_mixer(make_attention(kind, "eager", sparse_global_blocks=0, sparse_random_blocks=0), poisoned)
    assert eager[:, first_free:].isnan().all()


def test_each_kernel_does_what_it_can_and_hands_on_or_refuses_the_rest():
    def chosen(asked, training=False, **fields):
        config = build_config("debug", **fields)
        config._attn_implementation = asked
        return choose_kernel(config, training)

    for kernel in ("eager", "sdpa", "blockwise", "flex_attention"):
        assert chosen(kernel) == kernel
    assert chosen(None) == "sdpa"
    assert chosen("sdpa", **CAP) == "blockwise"
    assert chosen("sdpa", attention_normalizer="sparsemax") == "eager"
    assert chosen("sdpa", training=True, attention_dropout=0.1, **CAP) == "eager"
    assert chosen("blockwise", **CAP) == "blockwise"
    assert chosen("blockwise", attention_dropout=0.1) == "blockwise"  # no dropout outside training
    for asked in ("blockwise", "flex_attention"):
        with pytest.raises(ValueError, match=f"attention_dropout=0.1 is beyond attn_implementation={asked}; use sdpa"):
            chosen(asked, training=True, attention_dropout=0.1)
        with pytest.raises(ValueError, match="attention_normalizer=sparsemax is beyond"):
            chosen(asked, attention_normalizer="sparsemax")


def test_dropout_of_weights_is_applied_in_training():
    layer, states = make_attention("window", attention_dropout=0.5), random_states(1, 64)
    assert_close(run_mixer(layer, states), run_mixer(make_attention("window"), states))
    assert not torch.allclose(run_mixer(layer.train(), states), run_mixer(layer, states))


def test_models_are_loaded_with_a_kernel_and_change_it(tmp_path):
    torch.manual_seed(0)
    config = build_config("debug", mixer_types="attention,window", sliding_window=6, initializer_range=0.2)
    MMaDAForCausalLM(config).save_pretrained(tmp_path)
    tokens = torch.randint(8, 264, (2, 40))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="blockwise")
    assert model.config._attn_implementation == "blockwise"
    assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("eager")
    assert model(tokens, output_attentions=True).attentions[0].shape == (2, 4, 40, 40)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex_attention has no gradient on a CPU"):
        model(tokens)
    model.set_attn_implementation("blockwise")
    prompt = tokens[:, :20]
    blockwise = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None), blockwise)


def test_blockwise_serves_other_models_by_name_and_refuses_their_masks():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    model, tokens = LlamaForCausalLM(LlamaConfig(**shape)).double().eval(), torch.randint(3, 64, (2, 40))
    expected = model(tokens).logits
    model.set_attn_implementation("blockwise")
    first = model(tokens[:, :30], use_cache=True)
    rest = [model(tokens[:, [at]], past_key_values=first.past_key_values).logits for at in range(30, 40)]
    assert_close(torch.cat([first.logits, *rest], dim=1), expected)
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[0, :5] = 0
    with pytest.raises(ValueError, match="attn_implementation=blockwise takes neither the mask of LlamaAttention"):
        model(tokens, attention_mask=padding)
