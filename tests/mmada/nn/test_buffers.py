"""Buffers are used again when nobody holds them, never before, and idle memory is bounded."""

import threading

import pytest
import torch

from mmada.nn.buffers import BufferPool

MIB = 1 << 20


def floats(num_bytes: int) -> int:
    return num_bytes // 4


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool()


LIKE = torch.empty(0)


def test_memory_comes_back_when_the_last_view_is_gone(pool: BufferPool) -> None:
    first = pool.empty(LIKE, 4, floats(MIB))
    address, view = first.data_ptr(), first[3]
    del first
    other = pool.empty(LIKE, 4, floats(MIB))
    assert other.data_ptr() != address, "a view was still there"
    del view
    assert pool.empty(LIKE, 4, floats(MIB)).data_ptr() == address


def test_tensors_that_live_together_do_not_share(pool: BufferPool) -> None:
    tensors = [pool.empty(LIKE, floats(MIB)).fill_(value) for value in range(5)]
    del tensors[2]
    tensors += [pool.empty(LIKE, floats(MIB)).fill_(value) for value in (5, 6)]
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [3], [4], [5], [6]]


def test_what_is_idle_and_lent_is_bounded_by_what_was_once_lent(pool: BufferPool) -> None:
    for mebibytes in (8, 5, 3, 2, 6, 4, 7):
        pool.empty(LIKE, floats(mebibytes * MIB))
    last = pool.empty(LIKE, floats(MIB))
    held = [block.size for block in pool._idle]
    assert sum(held) + last.nbytes <= 1.25 * 8 * MIB
    assert held == [7 * MIB], "what was used last is kept"


def test_a_buffer_of_about_the_same_size_is_used_again(pool: BufferPool) -> None:
    first = pool.empty(LIKE, floats(4 * MIB) - 1000)
    address = first.data_ptr()
    del first
    assert pool.empty(LIKE, floats(4 * MIB) - 2000).data_ptr() == address
    assert pool.empty(LIKE, floats(3 * MIB)).data_ptr() != address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_alignment(pool: BufferPool, dtype: torch.dtype) -> None:
    tensor = pool.empty(torch.empty(0, dtype=dtype), 3, MIB)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor._is_view()) == ((3, MIB), dtype, True, False)
    assert tensor.data_ptr() % BufferPool.ALIGNMENT == 0
    assert tensor.untyped_storage().nbytes() == 3 * MIB * dtype.itemsize


def test_a_gradient_from_the_pool_is_an_ordinary_gradient(pool: BufferPool) -> None:
    parameter = torch.nn.Parameter(torch.zeros(floats(MIB)))
    parameter.grad = pool.empty(parameter, floats(MIB)).fill_(2)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert parameter.unique().tolist() == [-1]
    assert not parameter.grad.any()


def test_small_tensors_and_other_devices_are_left_to_pytorch(pool: BufferPool) -> None:
    assert pool.empty(LIKE, 10).shape == (10,)
    assert pool.empty(torch.empty(0, device="meta"), 4 * MIB).is_meta
    assert pool._most_lent == 0


def test_threads_never_get_the_same_memory(pool: BufferPool) -> None:
    failures = []

    def work(value: int) -> None:
        for _ in range(200):
            tensor = pool.empty(LIKE, floats(MIB))
            tensor[::1024] = value
            if not bool((tensor[::1024] == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
