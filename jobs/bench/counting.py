"""What can be counted rather than timed: operations, and the bytes that autograd keeps for the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


def _product_added_in_place(_into: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _grouped_product(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """Rows in groups, each with its own matrix: (N, D) and (E, D, F); or their gradient, (D, N) and (N, F)."""
    return 2 * math.prod(left) * right[-1]


def _matrix_times_vector(matrix: Any, _vector: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


# What torch 2.13's own table of formulas leaves out. The functions get shapes in place of tensors.
FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.addmm_: _product_added_in_place,
    _aten.baddbmm_: _product_added_in_place,
    _aten._grouped_mm: _grouped_product,
    _aten.mv: _matrix_times_vector,
}


class Kept(NamedTuple):
    """Bytes that one run of something holds at its end, apart from what was there before."""

    saved: int
    """In tensors saved for the backward pass."""
    output: int
    """In results that are not among those."""


def count_flops(work: Callable[[], Any]) -> tuple[int, Any]:
    """Floating-point operations of ``work()`` and what it returns.

    Those of matrix products, convolutions and attention, which are what grows with width times width; a product of
    (m, k) and (k, n) counts 2mkn, and attention's scores count in full where a fused kernel leaves out the masked
    half. Element-wise operations are not counted.
    """
    with flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        result = work()
    return counter.get_total_flops(), result


def count_kept(work: Callable[[], Any], besides: Iterable[Tensor] = ()) -> tuple[Kept, Any]:
    """What ``work()`` keeps for the backward pass and as its result, each storage once, and that result.

    ``besides``: tensors whose storage does not count, such as the parameters.
    """
    before = {_address(tensor) for tensor in besides}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in before:
            saved[_address(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    outputs = {_address(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
    new = [tensor for address, tensor in outputs.items() if address not in saved and address not in before]
    return Kept(_bytes(saved.values()), _bytes(new)), result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
