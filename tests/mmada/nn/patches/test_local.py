"""The byte side by itself: attention within patches, hashed n-grams, precision."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.blt.modeling_blt import compute_hash_embeddings

from mmada.nn.patches.local import HashEmbedding, read_bytes, read_bytes_reference, read_patches
from tests.mmada.nn.patches.byte_models import make_model, text_ids


def patches_of(length, batch=2):
    """Numbers of the patches that bytes belong to, every patch with a byte at least; their number."""
    torch.manual_seed(length)
    steps = torch.rand(batch, length) < 0.4
    steps[:, 0] = False
    patch_BS = steps.cumsum(dim=1)
    most = int(patch_BS[:, -1].min()) + 1
    return patch_BS.clamp(max=most), most  # number ``most`` is that of no patch


@pytest.mark.parametrize("length", [1, 63, 100])
def test_attention_within_patches_equals_the_masked_formula(length):
    patch_BS, most = patches_of(length)
    query, key = torch.randn(2, most, 3, 2, 8).double(), 5 * torch.randn(2, length, 2, 8).double()
    value, direction = torch.randn(2, length, 2, 8).double(), torch.randn(2, most, 3, 2, 8).double()
    results = []
    for attend in (read_bytes, read_bytes_reference):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = attend(*inputs, patch_BS)
        (output * direction).sum().backward()
        results.append([output, *(tensor.grad for tensor in inputs)])
    for fast, plain in zip(*results, strict=True):
        assert_close(fast, plain, rtol=1e-6, atol=1e-9)


def test_a_patch_without_bytes_is_zero_and_its_gradient_too():
    query = torch.randn(1, 2, 3, 2, 8, requires_grad=True)
    key = torch.randn(1, 4, 2, 8, requires_grad=True)
    output = read_bytes(query, key, key, torch.tensor([[0, 0, 2, 2]]))
    assert output[:, 1].abs().max() == 0
    output.sum().backward()
    assert query.grad[:, 1].abs().max() == 0 and key.grad[:, 2:].abs().max() == 0 and query.grad.isfinite().all()


def test_bytes_read_the_vectors_of_one_patch():
    """Against softmax over that patch's vectors, byte by byte."""
    patch_BT = torch.tensor([[0, 0, 1, 2, 2]])
    query, key, value = torch.randn(1, 5, 2, 8), torch.randn(1, 3, 4, 2, 8), torch.randn(1, 3, 4, 2, 8)
    output = read_patches(query, key, value, patch_BT)
    for byte, patch in enumerate(patch_BT[0].tolist()):
        for head in range(2):
            weights = (key[0, patch, :, head] @ query[0, byte, head]).softmax(dim=0)
            assert_close(output[0, byte, head], weights @ value[0, patch, :, head])


def test_hash_embedding_equals_transformers():
    torch.manual_seed(0)
    ids, sizes = torch.randint(0, 264, (2, 30)), [3, 4, 7]
    ours = HashEmbedding(sizes, 101, 16)
    bytes_table = torch.nn.Embedding(264, 16)
    fused = torch.nn.Embedding(3 * 101, 16)
    fused.weight.data.copy_(ours.weight)
    encoder = torch.nn.Module()
    encoder.embed_tokens = bytes_table
    theirs = compute_hash_embeddings(ids, encoder, fused, 1, sizes, 101)
    assert_close(ours(ids, torch.arange(30)[None], None) + bytes_table(ids), theirs)


def test_the_residual_is_doubled_where_asked():
    single, double = (make_model(patches={"doubled_residual": flag}) for flag in (False, True))
    layers = [model.model.patches.decoder.cross_attentions[0] for model in (single, double)]
    asking, asked = torch.randn(1, 4, 16).double(), torch.randn(1, 2, 2, 16).double()
    once, twice = (layer(asking, asked, torch.tensor([[0, 0, 1, 1]])) for layer in layers)
    assert_close(twice - once, asking)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_train(dtype):
    model, tokens = make_model("cut", dtype=dtype).train(), text_ids(2, 40)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert output.logits.dtype == dtype
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_starting_values():
    """Tables of n-grams start as small as the embeddings."""
    model = make_model(initializer_range=0.02, patches={"hash_vocab": 2003})
    weight = model.model.patches.encoder.hash_embedding.weight
    assert abs(weight.std().item() - 0.02) < 1e-3
    assert (model.model.patches.decoder.cross_attentions[0].q_norm.weight == 1).all()
