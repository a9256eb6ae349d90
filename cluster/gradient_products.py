"""How the gradients of several losses lie to each other: products over all parameters that learn, on all workers.

DeepSpeed's own preparations for a backward pass hang on the outputs of the model, and must not notice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def hooks_of(output: Any) -> list[Any]:
    """What DeepSpeed hung on the tensors of a model's output."""
    tensors = output.values() if isinstance(output, Mapping) else [output]
    return [hooks for each in tensors for hooks in getattr(each, "_backward_hook_managers", ())]


@contextlib.contextmanager
def unnoticed(found: Sequence[Any]) -> Iterator[None]:
    """DeepSpeed prepares itself at the first gradient that passes the model's outputs: not at these.

    ``found``: what ``hooks_of`` gave for the outputs.
    """
    kept = [(hooks, hooks.preprocess_once_fn, hooks.preprocess_per_tensor_fn) for hooks in found]
    for hooks in found:
        hooks.preprocess_once_fn, hooks.preprocess_per_tensor_fn = lambda: None, None
    try:
        yield
    finally:
        for hooks, once, per_tensor in kept:
            hooks.preprocess_once_fn, hooks.preprocess_per_tensor_fn = once, per_tensor
            hooks.reset()


def gradient_products(
    module: nn.Module,
    losses: Sequence[Tensor],
    copies_of: Callable[[str], Any],
    sharers_of: Callable[[str], Any],
) -> Tensor:
    """(K, K) float64, alike on all workers; a gradient is that of the mean over workers, as a step would take it.

    The losses may go backward afterwards. Parameters must be whole, but for experts that workers share out: those
    carry a ``group_name``, of which ``copies_of`` gives the process group of workers with the same experts, and
    ``sharers_of`` that of workers who hold all experts together.
    """
    world = dist.get_world_size()
    shared = [p for p in module.parameters() if p.requires_grad and not hasattr(p, "group_name")]
    own = [p for p in module.parameters() if p.requires_grad and hasattr(p, "group_name")]
    rows: list[Tensor] = []
    expert_rows: list[Tensor] = []
    for loss in losses:
        found = torch.autograd.grad(loss, shared + own, retain_graph=True, allow_unused=True)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(shared + own, found, strict=True)]
        flat = torch.cat([g.detach().flatten().double() for g in filled[: len(shared)]])
        dist.all_reduce(flat)
        rows.append(flat / world)
        for parameter, gradient in zip(own, filled[len(shared) :], strict=True):
            dist.all_reduce(gradient, group=copies_of(parameter.group_name))
        if own:  # experts have got gradients from the tokens of all workers
            expert_rows.append(torch.cat([g.detach().flatten().double() for g in filled[len(shared) :]]) / world)
    products = torch.stack(rows) @ torch.stack(rows).T
    if expert_rows:
        apart = torch.stack(expert_rows) @ torch.stack(expert_rows).T
        dist.all_reduce(apart, group=sharers_of(own[0].group_name))
        products = products + apart
    return products
