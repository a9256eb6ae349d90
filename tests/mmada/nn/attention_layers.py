"""Small attention layers of every kind, and what of theirs tests compare."""

import torch

from mmada.config import MMaDAConfig
from mmada.nn.mixers.attention import Attention
from tests.mmada.nn.layers import run_mixer

# A hundred tokens make several bands, blocks and windows of these.
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "num_hidden_layers": 1,
    "sliding_window": 5,
    "window_sizes": [3, -1],
    "sparse_block_size": 8,
    "sparse_window_blocks": 2,
}
KINDS = ("attention", "window", "multiscale", "sparse")


def make_attention(kind="attention", kernel=None, *, num_persistent=0, seed=0, **overrides):
    """A layer in float64 with weights that matter."""
    config = MMaDAConfig(**{**SIZES, **overrides})
    config._attn_implementation = kernel
    layer = Attention(config, 0, kind=kind, num_persistent=num_persistent).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def random_states(batch, length, width=24, seed=1):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradients(layer, states, **kwargs):
    """The output, and the gradients of a random linear functional of it: of the input and of every parameter."""
    layer.zero_grad(set_to_none=True)
    own = states.clone().requires_grad_()
    output = run_mixer(layer, own, **kwargs)
    (output * random_states(*output.shape, seed=2)).sum().backward()
    return [output.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())]
