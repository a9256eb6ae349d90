"""peft's adapters on every mixture of layers."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close

from mmada.model import MMaDAForCausalLM
from tests.mmada.mixtures import every_kind, make_mixture, random_ids

CLOSE = {"rtol": 1e-6, "atol": 1e-9}
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 5}


def adapted(model):
    torch.manual_seed(1)
    frozen = ".*entropy_model.*" if model.config.patches.needs_entropy_model else None
    settings = LoraConfig(r=4, target_modules="all-linear", exclude_modules=frozen, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_around_a_router_leaves_its_selection_bias_in_force(dtype):
    model, tokens = make_mixture("experts", dtype, router_bias_update_rate=0.1), random_ids(2, 12)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0.0, 0.0, -9.0]))
    expected = model(tokens).logits
    adapter_model = adapted(model).eval()  # starts as the identity
    assert torch.equal(adapter_model(input_ids=tokens).logits, expected)


@every_kind
def test_trains_merges_saves_and_loads(name, tmp_path):
    model, tokens = make_mixture(name), random_ids(2, 12)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model(tokens).logits
    peft_model = adapted(copy.deepcopy(model)).train()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.01), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = peft_model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    peft_model.eval()
    for key, parameter in peft_model.base_model.model.named_parameters():
        if "lora_" not in key:
            assert torch.equal(parameter, base[key.replace(".base_layer", "")]) and parameter.grad is None
    changed = peft_model(input_ids=tokens).logits
    assert (changed - plain).abs().max() > 0.01
    with peft_model.disable_adapter():
        assert_close(peft_model(input_ids=tokens).logits, plain, **CLOSE)
    with_cache, without = (peft_model.generate(input_ids=tokens, use_cache=on, **GREEDY) for on in (True, False))
    assert torch.equal(with_cache, without)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert_close(loaded(input_ids=tokens).logits, changed, **CLOSE)
    merged = peft_model.merge_and_unload()
    assert type(merged) is MMaDAForCausalLM and merged.state_dict().keys() == base.keys()
    assert_close(merged(tokens).logits, changed, **CLOSE)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_adapter_gets_a_gradient(name, dtype):
    """A layer that bypassed its modules' forward would leave its adapters idle."""
    model, tokens = adapted(make_mixture(name, dtype)).train(), random_ids(2, 12)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    idle = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert idle == []
