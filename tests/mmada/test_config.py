"""What the config refuses, and how it says so."""

import pytest

from mmada.config import MMaDAConfig
from mmada.presets import build_config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4; use one of"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 is not between 1 and num_experts=4; use at most 4"),
        ({"num_experts": 0, "mlp_layer_types": ["moe", "moe"]}, "num_experts=0; set num_experts"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types has 1 entries for num_hidden_layers=2; give one per layer"),
        ({"mlp_layer_types": ["dense", "sparse"]}, "'sparse'; use 'dense', 'moe'"),
        ({"hidden_size": 0}, "hidden_size=0 is not positive; use 1 or more"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"hidden_size": 30}, "num_attention_heads=4 does not divide hidden_size=30; use a number of heads that does"),
        ({"mixer_types": "ssm,,ssm"}, "mixer_types holds an empty entry: 'ssm,,ssm'"),
        ({"router_balance_scope": "layer"}, "router_balance_scope='layer' is unknown; use 'batch' or 'sequence'"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef=-1.0 is negative; use 0"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 is negative; use 0"),
        (
            {"cross_expert_attention": True, "cross_expert_heads": 5},
            "cross_expert_heads=5 does not divide hidden_size=64; use one of [1, 2, 4, 8, 16, 32, 64]",
        ),
        ({"token_mask_probability": 1.0}, "token_mask_probability=1.0 is not in [0, 1); use 0"),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 is not in [0, 1)"),
        ({"hidden_sise": 64}, "hidden_sise is not a field of the model"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
            "rope_parameters.rope_type=spiral is unknown",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
            "rope_parameters.factor=0.5 would shorten the context; use 1 or more",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(overrides, said):
    with pytest.raises(ValueError) as refused:
        build_config("debug", **overrides)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="preset=huge is not a known size; use one of debug, tiny"):
        build_config("huge")


def test_defaults_follow_the_fields_they_depend_on():
    config = MMaDAConfig(hidden_size=96, num_attention_heads=4, num_experts=2, num_hidden_layers=3)
    assert (config.head_dim, config.num_key_value_heads) == (24, 4)
    assert config.mlp_layer_types == ["moe"] * 3 and config.moe_layers == [0, 1, 2]
    assert build_config("tiny", num_hidden_layers=2).mlp_layer_types == ["moe", "moe"]
