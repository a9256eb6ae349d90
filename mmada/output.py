"""What the language model gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


@dataclass
class MMaDAOutput(MoeCausalLMOutputWithPast):
    """``loss`` is what training minimises; the numbers beside it are detached and for reading.

    ``parts``: the losses that it is made of, by name and with their gradients, each unweighted: ``language_model``, and
    in training with experts ``router_balance`` and ``router_z``.

    ``aux_loss``, ``z_loss``, ``source_balance``, ``expert_load`` (expert layers, E): the routers', in training; see
    ``mmada.training.objectives.router.RouterLosses``.
    ``num_patches`` (B,): patches of bytes that this forward pass finished, which the states inside are over.
    """

    lm_loss: Tensor | None = None
    parts: dict[str, Tensor] | None = None
    z_loss: Tensor | None = None
    source_balance: Tensor | None = None
    expert_load: Tensor | None = None
    num_patches: Tensor | None = None
