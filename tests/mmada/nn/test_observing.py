"""Statistics on request: against torch's own over the joined values, and silent when nobody asks."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmada.nn.observing import collect_statistics, is_anyone_looking, observe, record


class Layer(nn.Module):
    def forward(self, values, where=None):
        observe(self, where, gate=values, half=lambda: values / 2)
        return values


class OwnWords(Layer):
    def summarise(self, moments):
        return {"largest_mean": float(moments["gate"].mean_C.max())}


def test_running_moments_equal_those_of_all_values():
    model, batches = nn.Sequential(Layer()), [1e3 + torch.randn(2, n, 5, dtype=torch.float64) for n in (3, 1, 8)]
    with collect_statistics(model) as statistics:
        for values in batches:
            model(values)
    summary, values = statistics.summary()["0"], torch.cat(batches, dim=1)
    expected = {"mean": values.mean(), "std": values.std(correction=0), "min": values.min(), "max": values.max()}
    for name, value in expected.items():
        assert summary[f"gate_{name}"] == pytest.approx(float(value), rel=1e-12)
        assert summary[f"half_{name}"] == pytest.approx(float(value) / 2, rel=1e-12)


def test_padding_does_not_count_and_a_batch_of_it_says_nothing():
    layer, values = Layer(), torch.tensor([[[1.0], [9.0]], [[3.0], [9.0]]])
    with collect_statistics(layer) as statistics:
        layer(values, torch.zeros(2, 2, dtype=torch.bool))
        assert statistics.summary() == {}
        layer(values, torch.tensor([[True, False], [True, False]]))
    assert statistics.summary()[""]["gate_mean"] == 2.0
    assert statistics.summary()[""]["gate_max"] == 3.0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_checkpointing_computes_again_counts_once(use_reentrant):
    layer, values = Layer(), torch.ones(1, 2, 1, requires_grad=True)
    with record(layer, "half") as halves:
        checkpoint(lambda states: layer(states).square(), values, use_reentrant=use_reentrant).sum().backward()
    assert len(halves.calls[""]) == 1 and values.grad is not None


def test_a_module_may_summarise_in_its_own_words():
    model = OwnWords()
    with collect_statistics(model) as statistics:
        model(torch.tensor([[1.0, 4.0], [2.0, 8.0]]))
    assert statistics.summary() == {"": {"largest_mean": 6.0}}


def test_only_the_asked_model_in_the_asking_thread_is_looked_at():
    mine, other, values = Layer(), Layer(), torch.ones(1, 1)
    with collect_statistics(mine) as outer, collect_statistics(other) as inner:
        mine(values)
        thread = threading.Thread(target=other, args=(values,))
        thread.start()
        thread.join()
    other(values)
    assert outer.summary()[""]["gate_mean"] == 1.0
    assert inner.summary() == {}


def test_nobody_asking_means_nothing_is_computed():
    def never():
        raise AssertionError("computed for nobody")

    observe(Layer(), gate=never)


def test_a_record_keeps_the_values_of_one_name_with_nothing_at_padding():
    model, first, second = nn.Sequential(Layer()), torch.randn(2, 3, 4), torch.randn(2, 1, 4)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    assert not is_anyone_looking()
    with record(model, "gate") as gates:
        assert is_anyone_looking()
        model[0](first.requires_grad_(), valid)
        model(second)
    model(second)  # nobody looks any more
    assert list(gates.calls) == ["0"] and [each.shape[1] for each in gates.calls["0"]] == [3, 1]
    assert not gates["0"].requires_grad and gates["0"].isnan().sum() == 2 * 4
    assert torch.equal(gates["0"][0], torch.cat([first[0], second[0]]))
