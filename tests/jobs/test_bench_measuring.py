"""What the benches share: turns, ratios, counts of operations and of bytes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jobs.bench.counting import count_flops, count_kept
from jobs.bench.measuring import in_turns, log_slope, quartiles, with_spread


def test_every_round_begins_with_another_contender_and_the_first_are_thrown_away():
    called: list[str] = []

    def step(name: str) -> int:
        called.append(name)
        return len(called)

    results = in_turns({name: (lambda name=name: step(name)) for name in "abc"}, rounds=3, warm_ups=1)
    assert "".join(called) == "cab" + "abc" + "bca" + "cab"
    assert results == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_slope_and_quartiles():
    assert log_slope([512, 1024, 2048], [3 * 512**1.5, 3 * 1024**1.5, 3 * 2048**1.5]) == pytest.approx(1.5)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert with_spread((0.951, 12.34, 99.9)) == "12.3 (0.95 .. 99.9)"


def test_operations_that_torch_does_not_count_by_itself():
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: torch.zeros(3, 7).addmm_(left, right))[0] == 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.zeros(2, 3, 7).baddbmm_(left.expand(2, 3, 5), right.expand(2, 5, 7)))[0] == 420
    assert count_flops(lambda: torch.mv(left, right[:, 0]))[0] == 2 * 3 * 5
    assert count_flops(lambda: torch.mm(left, right, out=torch.empty(3, 7)))[0] == 2 * 3 * 5 * 7


def test_operations_of_fused_attention_on_a_cpu():
    query, key, value = (torch.randn(2, heads, 10, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(10, 10, dtype=torch.bool).tril()
    product = 2 * 2 * 4 * 10 * 10 * 8  # batch, heads, queries, keys, width
    for given in ({"is_causal": True}, {"attn_mask": mask}):
        forward, output = count_flops(
            lambda given=given: F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **given)
        )
        assert forward == 2 * product
        assert count_flops(lambda output=output: output.sum().backward())[0] == 5 * product


def test_operations_of_a_grouped_product():
    rows = torch.randn(12, 16, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(3, 16, 32, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([2, 7, 12], dtype=torch.int32)
    forward, output = count_flops(lambda: F.grouped_mm(rows, weights, offs=ends))
    assert forward == 2 * 12 * 16 * 32
    assert count_flops(lambda: output.backward(torch.randn_like(output)))[0] == 2 * forward


def test_bytes_are_counted_once_and_without_the_parameters():
    layer, x = nn.Linear(6, 4), torch.randn(5, 6, requires_grad=True)
    kept, _ = count_kept(lambda: layer(x), layer.parameters())
    assert kept == (5 * 6 * 4, 5 * 4 * 4)  # the input, for the weight's gradient; the output
    kept, _ = count_kept(lambda: layer(x) + layer(x[:2]).sum(), layer.parameters())
    assert kept.saved == 5 * 6 * 4  # a view has no memory of its own
    kept, _ = count_kept(lambda: x.exp(), [])
    assert kept == (5 * 6 * 4, 0)  # what is saved is the output
    kept, _ = count_kept(lambda: layer(x), [*layer.parameters(), x])
    assert kept.saved == 0
