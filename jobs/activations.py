"""Memory for activations: what autograd keeps for the backward pass of one micro batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from mmada.config import MMaDAConfig
    from mmada.model import MMaDAForCausalLM

BYTES = {"fp32": 4, "bf16": 2}
# Parameters up to which a model that the formula does not know is built and run once to see.
LARGEST_MEASURED = 200_000_000


@dataclass(frozen=True)
class Activations:
    """Bytes that one worker keeps for the backward pass of one micro batch, and how they were found."""

    full: int
    checkpointed: int
    how: str = "by formula"


def activation_memory(recipe: Recipe, config: MMaDAConfig) -> Activations:
    """By formula for a plain transformer, else measured on one row; by formula again where that would take long."""
    if is_plain(recipe, config):
        return activations_by_formula(recipe, config)
    from mmada.model import count_parameters

    if count_parameters(config)[0] > LARGEST_MEASURED:
        counted = activations_by_formula(recipe, config)
        return replace(counted, how="by formula as if every layer were plain attention")
    return measured_activations(recipe, config)


def is_plain(recipe: Recipe, config: MMaDAConfig) -> bool:
    """Whether the formula knows all that the model is made of."""
    return (
        set(config.mixer_types or ()) == {"attention"}
        and recipe.model.attn_implementation in ("sdpa", "eager")
        and config.position_embedding_type == "rope"
        and config.attention_normalizer == "softmax"
        and config.patches.mode == "none"
        and not (config.qk_norm or config.attn_logit_softcapping or config.final_logit_softcapping)
        and not (config.embedding_dropout or config.token_mask_probability)
    )


def measured_activations(recipe: Recipe, config: MMaDAConfig) -> Activations:
    """What autograd keeps in a forward pass of one row of random tokens, times the rows of a micro batch.

    With checkpointing one block at a time is computed anew, and the largest counts. Experts that are
    split over workers keep more than those here, as ``feed_forward_bytes`` says.
    """
    import torch

    from jobs.model_building import build_model

    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    if recipe.model.attn_implementation == "flex_attention":  # no gradient on this CPU; ours in blocks keeps as much
        in_blocks = recipe.model.model_copy(update={"attn_implementation": "blockwise"})
        recipe = recipe.model_copy(update={"model": in_blocks})
    if config.patches.needs_entropy_model and config.patches.threshold is None:
        config = copy.deepcopy(config)
        config.patches.threshold = 1.0  # training finds it on the text; some patches are what counts here
    model = build_model(recipe, config).to(dtype).train()
    model.activation_checkpointing_disable()
    full, by_block = kept_by_block(model, recipe.train.sequence_length)
    model.activation_checkpointing_enable({"use_reentrant": False})
    staying, _ = kept_by_block(model, recipe.train.sequence_length)
    away = feed_forward_bytes(recipe, config, "moe") - feed_forward_bytes(recipe, config, "moe", alone=True)
    extra = recipe.train.sequence_length * away * len(config.moe_layers)
    return Activations(
        full=recipe.micro_batch * recipe.sequences_per_row * (full + extra),
        checkpointed=recipe.micro_batch * recipe.sequences_per_row * (staying + max(by_block)),
        how="measured on one row",
    )


def kept_by_block(model: MMaDAForCausalLM, length: int) -> tuple[int, list[int]]:
    """Bytes that autograd keeps in a forward pass of one row of random tokens: in all, and in each block."""
    import torch

    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}  # bytes by address
    by_block = [0] * len(model.model.layers)

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            kept.setdefault(address, tensor.untyped_storage().nbytes())
        return tensor

    def count(index: int, sign: int) -> None:
        by_block[index] += sign * sum(kept.values())

    hooks = []
    for index, block in enumerate(model.model.layers):
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: count(index, -1)))
        hooks.append(block.register_forward_hook(lambda *_, index=index: count(index, 1)))
    ids = torch.randint(8, model.config.vocab_size, (1, length + 1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False)
    for hook in hooks:
        hook.remove()
    del output  # until here nothing that was kept is freed, so addresses are not used again
    return sum(kept.values()), by_block


def activations_by_formula(recipe: Recipe, config: MMaDAConfig) -> Activations:
    """Bytes that autograd keeps for one micro batch, counted tensor by tensor as in arXiv:2205.05198, section 4.1.

    Per token, in elements, with width D, H heads and G key/value heads of size K, length T: a block keeps of its two
    norms the input and the normalised states (4D, in 32 bits always) and the result (2D); queries and attention's
    output (2HK), keys and values (2GK); and what ``feed_forward_bytes`` says. Eager attention, which repeats keys and
    values and keeps its weights: 4HK + HT, the softmax in 32 bits besides. The head keeps its norm (2D in 32 bits, D)
    and the logits' log-softmax (V in 32 bits). With checkpointing only the input (D) of each block stays, and one
    block at a time is computed anew (arXiv:1604.06174). tests/jobs/test_plan.py compares with what autograd holds.
    """
    width, length = BYTES[recipe.train.precision], recipe.train.sequence_length
    assert config.head_dim and config.num_key_value_heads and config.mlp_layer_types, "filled in by the config itself"
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = width * (2 * heads + 2 * config.num_key_value_heads * config.head_dim)
    if recipe.model.attn_implementation == "eager":
        softmax = config.num_attention_heads * length
        attention = width * (4 * heads + softmax) + (4 * softmax if width < 4 else 0)
    norms = 4 * 4 * hidden + width * 2 * hidden
    blocks = [norms + attention + feed_forward_bytes(recipe, config, kind) for kind in config.mlp_layer_types]
    head = 4 * 2 * hidden + width * hidden + 4 * config.vocab_size
    tokens = recipe.micro_batch * recipe.sequences_per_row * length
    return Activations(
        full=tokens * (sum(blocks) + head),
        checkpointed=tokens * (width * hidden * len(blocks) + max(blocks) + head),
    )


def feed_forward_bytes(recipe: Recipe, config: MMaDAConfig, kind: str, alone: bool = False) -> int:
    """Bytes that a feed-forward keeps per token; ``alone``: in one process on a CPU, whatever the recipe says.

    Dense: gate, its SiLU, up and their product, 4F. Experts: for each of the k chosen, gate and up (2M) and the
    output (D), all else being computed anew; where grouped matmul runs or tokens travel between workers, the SiLU, the
    product (2M more) and the gathered input (D more) are kept too. Attention among them: the input, the output, its
    norm, query, key, value, what is mixed and the sum, 8D for each chosen. S shared experts: 4SM. The router keeps
    about 5E in 32 bits.
    """
    width = BYTES[recipe.train.precision]
    if kind == "dense":
        return width * 4 * config.intermediate_size
    frugal = alone or recipe.cluster.gpus_per_worker == 0 and recipe.cluster.expert_parallel == 1
    per_expert = (2 if frugal else 4) * config.moe_intermediate_size + (1 if frugal else 2) * config.hidden_size
    if config.cross_expert_attention:
        per_expert += 8 * config.hidden_size
    shared = width * 4 * config.num_shared_experts * config.moe_intermediate_size
    router = 4 * 5 * config.num_experts + (4 * 2 * config.hidden_size if width < 4 else 0)
    return width * config.num_experts_per_tok * per_expert + shared + router
