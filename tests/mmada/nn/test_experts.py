"""The fast expert feed-forward against its reference, transformers' experts and numerical gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from mmada.nn import buffers, experts
from mmada.nn.experts import (
    Experts,
    expert_ffn,
    expert_ffn_reference,
    expert_ffn_sorted,
    expert_ffn_sorted_reference,
)

# T tokens, K experts per token, E experts, D model width, F hidden width of an expert, N tokens ordered by expert


def make_inputs(
    num_tokens: int, top_k: int, num_experts: int, *, width: int = 12, inner: int = 10, dtype=torch.float64, unused=()
) -> tuple[Tensor, ...]:
    """Tokens, experts, weights and parameters as ``expert_ffn`` takes them; no token goes to ``unused``."""
    torch.manual_seed(num_tokens + 10 * top_k)
    used = torch.tensor([expert for expert in range(num_experts) if expert not in unused])
    index_TK = used[torch.rand(num_tokens, len(used)).argsort(dim=-1)[:, :top_k]]
    floats = (
        torch.randn(num_tokens, width),
        torch.rand(num_tokens, top_k) + 0.1,
        torch.randn(num_experts, 2 * inner, width) / width**0.5,
        torch.randn(num_experts, width, inner) / inner**0.5,
    )
    hidden, weights, gate_up, down = (tensor.to(dtype).requires_grad_() for tensor in floats)
    return hidden, index_TK, weights, gate_up, down


def outputs_and_gradients(function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradient of every input that wants one, for a fixed gradient of the output."""
    output = function(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    generator = torch.Generator().manual_seed(7)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, wanted, grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 100])
def test_values_and_gradients_equal_the_reference(num_tokens: int, top_k: int) -> None:
    inputs = make_inputs(num_tokens, top_k, num_experts=7, unused=(0, 3, 6))
    actual = outputs_and_gradients(expert_ffn, inputs)
    assert_same(actual, outputs_and_gradients(expert_ffn_reference, inputs), rtol=1e-11, atol=1e-11)
    for grad_parameter in actual[-2:]:
        assert not grad_parameter[[0, 3, 6]].any()


@pytest.mark.parametrize("wave_numel", [1, 200, 1000])
def test_how_experts_are_cut_into_waves_does_not_matter(wave_numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(63, 2, num_experts=7, unused=(3,))
    expected = outputs_and_gradients(expert_ffn_reference, inputs)
    monkeypatch.setattr(experts, "WAVE_NUMEL", wave_numel)
    assert len(experts._waves([0, 5, 5, 30, 31], 20)) == {1: 5, 200: 3, 1000: 1}[wave_numel]
    assert_same(outputs_and_gradients(expert_ffn, inputs), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("frozen", [(0,), (2,), (3,), (4,), (2, 3, 4), (0, 2), (0, 2, 3)])
def test_only_the_gradients_asked_for(frozen: tuple[int, ...]) -> None:
    inputs = list(make_inputs(63, 2, num_experts=5))
    for place in frozen:
        inputs[place] = inputs[place].detach()
    actual = outputs_and_gradients(expert_ffn, tuple(inputs))
    assert_same(actual, outputs_and_gradients(expert_ffn_reference, tuple(inputs)), rtol=1e-11, atol=1e-11)


def test_gradients_by_finite_differences() -> None:
    hidden, index, *floats = make_inputs(6, 2, num_experts=4, width=4, inner=3, unused=(1,))
    assert torch.autograd.gradcheck(lambda hidden, *rest: expert_ffn(hidden, index, *rest), (hidden, *floats))


@pytest.mark.parametrize(
    ("num_rows", "counts"), [(0, [0, 0, 0]), (1, [0, 1, 0]), (63, [20, 0, 43]), (100, [7, 60, 13])]
)
def test_sorted_tokens_with_padding(num_rows: int, counts: list[int]) -> None:
    torch.manual_seed(0)
    shapes = [(num_rows, 12), (3, 10, 12), (3, 10, 12), (3, 12, 10)]
    hidden, *weights = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    inputs = hidden, torch.tensor(counts), *weights
    actual = outputs_and_gradients(expert_ffn_sorted, inputs)
    assert_same(actual, outputs_and_gradients(expert_ffn_sorted_reference, inputs), rtol=1e-11, atol=1e-11)
    assert not actual[0][sum(counts) :].any(), "padding rows of the output"
    assert not actual[1][sum(counts) :].any(), "padding rows of the gradient"


def test_sorted_tokens_take_a_gradient_that_is_expanded() -> None:
    torch.manual_seed(0)
    weights = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 5, 4), (2, 5, 4), (2, 4, 5)]
    ]
    inputs = torch.randn(9, 4, dtype=torch.float64), torch.tensor([3, 5]), *weights
    results = [torch.autograd.grad(f(*inputs).sum(), weights) for f in (expert_ffn_sorted, expert_ffn_sorted_reference)]
    assert_same(list(results[0]), list(results[1]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sorted_tokens", [False, True])
def test_grouped_matrix_products(sorted_tokens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA, on the CPU's kernel of the same operator; it has no float64."""
    inputs = make_inputs(63, 2, num_experts=5, width=16, inner=8, dtype=torch.float32, unused=(2,))
    fast, reference = expert_ffn, expert_ffn_reference
    if sorted_tokens:
        hidden, _, _, gate_up, down = inputs
        inputs = hidden, torch.tensor([20, 0, 31, 1, 3]), *(part.detach() for part in gate_up.chunk(2, dim=1)), down
        fast, reference = expert_ffn_sorted, expert_ffn_sorted_reference
    expected = outputs_and_gradients(reference, inputs)
    monkeypatch.setattr(experts, "_has_grouped_mm", lambda hidden, w_down: True)
    assert_same(outputs_and_gradients(fast, inputs), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("theirs", "config"), [(MixtralExperts, MixtralConfig), (Qwen3MoeExperts, Qwen3MoeConfig)])
def test_parity_with_transformers(theirs: type, config: type) -> None:
    width_name = "intermediate_size" if config is MixtralConfig else "moe_intermediate_size"
    experts_name = "num_local_experts" if config is MixtralConfig else "num_experts"
    their_config = config(**{"hidden_size": 12, width_name: 10, experts_name: 6, "num_experts_per_tok": 2})
    their_config._experts_implementation = "eager"
    hidden, index, weights, gate_up, down = make_inputs(63, 2, num_experts=6, unused=(4,))
    their_module, our_module = theirs(their_config).double(), Experts(6, 12, 10).double()
    their_module.load_state_dict({"gate_up_proj": gate_up.detach(), "down_proj": down.detach()})
    our_module.load_state_dict(their_module.state_dict())
    results = []
    for module in (our_module, their_module):
        output = module(hidden, index, weights)
        inputs = hidden, weights, module.gate_up_proj, module.down_proj
        results.append([output.detach(), *torch.autograd.grad(output.square().sum(), inputs)])
    assert_same(*results, rtol=1e-10, atol=1e-10)
    probe = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(our_module.act_fn(probe), their_module.act_fn(probe))


def test_bfloat16_is_as_close_as_its_precision_allows() -> None:
    inputs = make_inputs(100, 2, num_experts=5, width=64, inner=32, dtype=torch.bfloat16, unused=(1,))
    in_double = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    actual, exact = outputs_and_gradients(expert_ffn, inputs), outputs_and_gradients(expert_ffn_reference, in_double)
    for ours, best in zip(actual, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # Four roundings at 2^-9 on the way from input to output, of values that stay near one.
        assert (ours.double() - best).abs().max() < 4 * 2**-9 * best.abs().max()


def test_autocast_computes_in_its_dtype_and_keeps_gradients_in_theirs() -> None:
    inputs = make_inputs(63, 2, num_experts=5, dtype=torch.float32)
    rounded = tuple(t.detach().bfloat16().requires_grad_() if t.is_floating_point() else t for t in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_gradients(expert_ffn, inputs)
    assert actual[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    expected = outputs_and_gradients(expert_ffn, rounded)
    assert_same([tensor.bfloat16() for tensor in actual], expected, rtol=0, atol=0)


def test_weights_may_come_in_another_dtype_than_the_tokens() -> None:
    hidden, index, weights, gate_up, down = make_inputs(10, 2, num_experts=5, dtype=torch.bfloat16)
    output = expert_ffn(hidden, index, weights.float(), gate_up, down)
    torch.testing.assert_close(output, expert_ffn(hidden, index, weights, gate_up, down), rtol=0, atol=0)


def test_activation_checkpointing_changes_nothing() -> None:
    inputs = make_inputs(63, 2, num_experts=5, dtype=torch.float32)
    plain = outputs_and_gradients(expert_ffn, inputs)
    again = outputs_and_gradients(lambda *args: checkpoint(expert_ffn, *args, use_reentrant=False), inputs)
    assert_same(again, plain, rtol=0, atol=0)


def test_without_gradients_the_result_is_the_same() -> None:
    inputs = make_inputs(63, 2, num_experts=5)
    with torch.no_grad():
        quiet = expert_ffn(*inputs)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, expert_ffn(*inputs).detach(), rtol=0, atol=0)


def test_two_runs_agree_bit_for_bit() -> None:
    inputs = make_inputs(300, 4, num_experts=8, width=128, inner=256, dtype=torch.float32)
    assert_same(outputs_and_gradients(expert_ffn, inputs), outputs_and_gradients(expert_ffn, inputs), rtol=0, atol=0)


def test_what_a_reused_buffer_held_is_not_seen() -> None:
    """Expert 1 has no token: its gradient is zero and not what the memory held before."""
    inputs = make_inputs(40, 2, num_experts=4, width=128, inner=256, unused=(1,))
    assert inputs[-1].numel() * 8 >= buffers.BufferPool.SMALLEST, "too small to come from the pool"
    expected = outputs_and_gradients(expert_ffn_reference, inputs)
    for shape in ((4, 512, 128), (4, 128, 256), (80, 512)):
        buffers.empty(inputs[0], *shape).fill_(float("nan"))
    assert_same(outputs_and_gradients(expert_ffn, inputs), expected, rtol=1e-10, atol=1e-10)


def test_a_second_derivative_is_refused() -> None:
    inputs = make_inputs(5, 2, num_experts=3)
    (gradient,) = torch.autograd.grad(expert_ffn(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_index_that_is_no_expert_is_refused(wrong: int) -> None:
    hidden, index, *rest = make_inputs(5, 2, num_experts=5)
    index[2, 1] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*the experts are 0 \.\. 4"):
        expert_ffn(hidden, index, *rest)


def test_counts_beyond_the_tokens_are_refused() -> None:
    weights = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="adds up to 7, but there are 6 tokens"):
        expert_ffn_sorted(torch.zeros(6, 4), torch.tensor([3, 4]), *weights)
