"""Weights packed, read back, sent through a real object store and damaged on the way."""

import sys
import time
import warnings
import weakref

import numpy as np
import psutil
import pytest
import ray
import torch

from cluster.errors import ClusterError
from cluster.weights import ALIGNMENT, PackedWeights, fetch, pack, publish, unpack

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

WAIT_S = 60


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "float32": torch.randn(3, 5),
        "bfloat16": torch.randn(7, dtype=torch.bfloat16),
        "float16, transposed": torch.randn(4, 3, dtype=torch.float16).T,
        "float64, a number": torch.tensor(0.1, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
        "int64, every other": torch.arange(10)[::2],
        "uint8": torch.tensor([[255], [0]], dtype=torch.uint8),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "big, with a gradient": torch.randn(700, 800, requires_grad=True),  # more than the buffer begins with
        "after it": torch.full((1,), -0.0),
    }


def test_all_kinds_of_tensors_come_back_to_the_bit():
    tensors = some_tensors()
    packed = pack(tensors.items(), version=3)
    packed.verify(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unpack(packed)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(as_bytes(found[name]), as_bytes(tensor.detach())), name
    assert all(entry.offset % ALIGNMENT == 0 for entry in packed.layout)
    assert packed.num_bytes == packed.layout[-1].offset + 4
    assert packed.buffer.flags.c_contiguous and packed.buffer.dtype == np.uint8


def test_unpacked_tensors_are_views_that_keep_the_buffer():
    packed = pack(some_tensors().items())
    start, end = packed.buffer.ctypes.data, packed.buffer.ctypes.data + packed.num_bytes
    found = unpack(packed)
    assert all(start <= each.data_ptr() < end for each in found.values() if each.numel())
    buffer = weakref.ref(packed.buffer)
    number = found["float64, a number"]
    del packed, found
    assert buffer() is not None and float(number) == 0.1
    del number
    assert buffer() is None


def test_nothing_is_packed_into_an_empty_buffer():
    packed = pack([])
    packed.verify(0)
    assert unpack(packed) == {} and packed.num_bytes == 0


def test_one_tensor_at_a_time_is_held():
    alive: list[weakref.ref] = []

    def made_one_by_one():
        for index in range(6):
            assert [ref() for ref in alive] == [None] * index
            tensor = torch.full((1000, 1000), float(index))
            alive.append(weakref.ref(tensor))
            yield str(index), tensor
            del tensor

    found = unpack(pack(made_one_by_one()))
    assert [float(found[str(index)].mean()) for index in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ClusterError, match="weights named a come twice"):
        pack([("a", torch.zeros(1)), ("b", torch.zeros(1)), ("a", torch.zeros(1))])


def test_damage_and_mistaken_versions_are_found():
    packed = pack(some_tensors().items(), version=3)
    with pytest.raises(ClusterError, match="weights are of version 3, not of version 4; publish them again"):
        packed.verify(4)
    unpack(packed)["uint8"][0, 0] = 254  # one bit
    with pytest.raises(ClusterError, match="weights of version 3 are damaged: checksum [0-9a-f]{8}, packed with"):
        packed.verify(3)
    unpack(packed)["uint8"][0, 0] = 255
    packed.verify(3)
    other_version = PackedWeights(4, packed.buffer, packed.layout, packed.checksum)
    other_order = PackedWeights(3, packed.buffer, packed.layout[::-1], packed.checksum)
    for wrong in (other_version, other_order):
        with pytest.raises(ClusterError, match="are damaged"):
            wrong.verify()


class Reader:
    """Maps published weights, and says what that did to its own memory."""

    def read(self, packed: PackedWeights) -> tuple[float, int]:
        before = psutil.Process().memory_full_info().uss
        self.tensors = unpack(packed)  # kept, as a model would
        total = float(sum(tensor.sum(dtype=torch.float64) for tensor in self.tensors.values()))  # every page is read
        packed.verify(5)
        return total, psutil.Process().memory_full_info().uss - before

    def publish(self, value: float, size: int = 10) -> list:
        return [publish(pack([("a", torch.full((size,), value))], version=1))]


def test_actors_of_a_node_share_one_copy(ray_session):
    size = 128 * 2**20
    readers = [ray.remote(Reader).options(num_cpus=0).remote() for _ in range(2)]
    small = publish(pack([("a", torch.ones(10))], version=5))
    ray.get([reader.read.remote(small) for reader in readers], timeout=WAIT_S)  # torch is there, and warm
    ref = publish(pack([("a", torch.ones(size // 8)), ("b", torch.ones(size // 8))], version=5))
    for total, grown in ray.get([reader.read.remote(ref) for reader in readers], timeout=WAIT_S):
        assert total == size / 4
        assert grown < size / 8
    for reader in readers:
        ray.kill(reader)


def test_weights_lost_with_their_publisher_are_not_there(ray_session):
    publisher = ray.remote(Reader).options(num_cpus=0).remote()
    kept, lost = (ray.get(publisher.publish.remote(value), timeout=WAIT_S)[0] for value in (1.0, 2.0))
    packed = fetch(kept, WAIT_S)
    assert packed is not None and packed.version == 1
    ray.kill(publisher)
    deadline = time.monotonic() + WAIT_S
    while fetch(lost, 5) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert unpack(packed)["a"].tolist() == [1.0] * 10  # what was fetched stays
    again = fetch(publish(packed), WAIT_S)
    assert again is not None and unpack(again)["a"].tolist() == [1.0] * 10


def test_weights_that_do_not_come_in_time_are_not_there(ray_session):
    @ray.remote(num_cpus=0)
    def late() -> PackedWeights:
        time.sleep(2)
        return pack([("a", torch.ones(3))], version=2)

    ref = late.remote()
    assert fetch(ref, 0.2) is None
    packed = fetch(ref, WAIT_S, version=2)
    assert packed is not None and unpack(packed)["a"].tolist() == [1.0] * 3
    with pytest.raises(ClusterError, match="weights are of version 2, not of version 3"):
        fetch(ref, WAIT_S, version=3)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
