"""A model taken apart for ``mmada profile``: each part with the inputs it gets, so that it can be run alone.

One forward pass of the whole model records what every part is called with. A part is all layers of one kind; it is
run on copies of those inputs, forward and backward, without the rest of the model.

# B batch, T tokens, D model, V vocabulary, E experts, K experts per token
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmada.model import MMaDAForCausalLM
from mmada.nn.block import Block
from mmada.nn.context import Context
from mmada.nn.moe import MoE
from mmada.nn.patches.byte_patches import BytePatches
from mmada.nn.router import choose_experts, gate_of, selection_bias_of

# Names in the table of children of the model and of its blocks; one that is not here goes by its attribute's name.
NAMES = {
    "embed_tokens": "embeddings",
    "norm": "norms",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "cross_experts": "cross-expert attention",
    "encoder": "byte encoder",
    "pooling": "patch pooling",
    "decoder": "byte decoder",
}
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Call:
    """Something that the model calls, and what with."""

    function: Callable[..., Any]
    inputs: Inputs


@dataclass
class Part:
    """All layers of one kind, or the one thing of its kind, with their calls in one forward pass."""

    name: str
    calls: list[Call] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    def inputs(self) -> list[Inputs]:
        """Copies of what every call gets, cut off from the model; the layers share one new context, as in it."""
        contexts: dict[int, Context] = {}

        def own(leaf: Any) -> Any:
            if isinstance(leaf, Context):
                return contexts.setdefault(id(leaf), replace(leaf, _made={}))
            return _cut_off(leaf)

        return [tree_map(own, call.inputs) for call in self.calls]

    def forward(self, inputs: list[Inputs]) -> list[Tensor]:
        """Run every call on such inputs; the outputs that have a gradient."""
        outputs = [
            call.function(*positional, **by_name)
            for call, (positional, by_name) in zip(self.calls, inputs, strict=True)
        ]
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def parameters(self) -> dict[int, nn.Parameter]:
        """The parameters of its layers by identity."""
        return {id(parameter): parameter for module in self.modules for parameter in module.parameters()}


def take_apart(model: MMaDAForCausalLM, batch: dict[str, Any]) -> list[Part]:
    """The parts of a model in the order of the forward pass, with what they are called with for ``batch``."""
    placed = list(_places(model))
    blocks: list[Any] = list(model.model.layers)
    with record([module for _, module in placed] + blocks) as calls:
        logits = model(**batch).logits
    parts: dict[str, Part] = {}
    for name, module in placed:
        part = parts.setdefault(name, Part(name))
        part.modules.append(module)
        if name != "router":
            part.calls += [Call(module, inputs) for inputs in calls[module]]
    for block in blocks:
        if block.router_tap is not None:
            (gate_inputs,), (block_inputs,) = calls[gate_of(block.mlp)], calls[block]
            parts["router"].calls.append(_routing(block, gate_inputs, block_inputs))
    loss = Part("loss", [_loss(model, logits, batch["shift_labels"])])
    return [*_kinds_together([part for part in parts.values() if part.calls]), loss]


def _kinds_together(parts: list[Part]) -> list[Part]:
    """The parts in their order, but all mixers where the first one stands, and all feed-forwards."""
    kinds = [part.name.partition(":")[0] for part in parts]
    return sorted(parts, key=lambda part: kinds.index(part.name.partition(":")[0]))


def _places(model: MMaDAForCausalLM) -> Iterator[tuple[str, nn.Module]]:
    """The modules that do the work, each with the name of its part."""
    for name, child in model.model.named_children():
        if name == "layers":
            for index, block in enumerate(model.model.layers):
                yield from _places_in_block(block, f"mixer: {model.config.mixer_types[index]}")
        elif isinstance(child, BytePatches):  # calls the layers itself
            yield from ((_name(inner), module) for inner, module in child.named_children())
        elif not isinstance(child, nn.Identity):
            yield _name(name), child
    yield "head", model.lm_head


def _name(attribute: str) -> str:
    return NAMES.get(attribute, attribute.replace("_", " "))


def _places_in_block(block: Any, mixer: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if isinstance(child, MoE):
            yield "feed-forward: experts", child.experts
        elif name in ("mixer", "mlp"):
            yield mixer if name == "mixer" else "feed-forward: dense", child
        elif child is block.router_tap:
            yield "router", gate_of(block.mlp)
            yield "router", child
        else:
            yield _name(name), child


@contextmanager
def record(modules: list[nn.Module]) -> Iterator[dict[nn.Module, list[Inputs]]]:
    """What each module is called with inside the block, detached."""
    calls: dict[nn.Module, list[Inputs]] = {module: [] for module in modules}

    def remember(module: nn.Module, positional: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        calls[module].append(tree_map(_cut_off, (positional, by_name)))

    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in calls]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _cut_off(leaf: Any) -> Any:
    """A tensor on the same memory that belongs to no graph, but asks for a gradient if the original did."""
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _routing(block: Block, gate_inputs: Inputs, block_inputs: Inputs) -> Call:
    """A block's gate with its noise, and the choice of experts."""
    config = block.config
    bound = inspect.signature(block.forward).bind(*block_inputs[0], **block_inputs[1])
    noise_keys_T = bound.arguments.get("noise_keys_T")

    def route(flat_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = block.router_tap.run_gate(block.mlp, flat_TD, noise_keys_T)
        weights_TK, _ = choose_experts(
            logits_TE,
            config.num_experts_per_tok,
            normalise=config.norm_topk_prob,
            selection_bias=selection_bias_of(block.mlp),
            normalizer=config.router_normalizer,
        )
        return logits_TE, weights_TK

    return Call(route, gate_inputs)


def _loss(model: MMaDAForCausalLM, logits_BTV: Tensor, labels_BT: Tensor) -> Call:
    """The language-model loss; the labels are shifted already."""
    settings = {"labels": None, "shift_labels": labels_BT, "vocab_size": model.config.vocab_size}
    return Call(model.loss_function, ((_cut_off(logits_BTV),), settings))
