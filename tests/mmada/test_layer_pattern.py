"""Which layer stands where: long form, short forms, and what is refused."""

import pytest

from mmada.layer_pattern import expand_pattern
from mmada.presets import build_config


@pytest.mark.parametrize(
    ("pattern", "num_layers", "kinds"),
    [
        (None, 2, ["attention", "attention"]),
        ("attention*4", 4, ["attention"] * 4),
        ("ssm,ssm,attention", 6, ["ssm", "ssm", "attention"] * 2),
        ("ssm*2, attention", 3, ["ssm", "ssm", "attention"]),
        ("ssm", 3, ["ssm"] * 3),
        (["ssm*2", "window"], 3, ["ssm", "ssm", "window"]),
    ],
)
def test_a_pattern_names_one_kind_per_layer(pattern, num_layers, kinds):
    assert expand_pattern("mixer_types", pattern, num_layers, "attention") == kinds


@pytest.mark.parametrize(
    ("pattern", "num_layers", "said"),
    [
        ("ssm,attention", 3, "for num_hidden_layers=3"),
        (["ssm"], 2, "for num_hidden_layers=2"),  # a list is not repeated
        ("ssm*0", 1, "holds 'ssm*0'"),
        ("ssm*x", 1, "holds 'ssm*x'"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern, num_layers, said):
    with pytest.raises(ValueError) as refused:
        expand_pattern("mixer_types", pattern, num_layers, "attention")
    assert str(refused.value).startswith("mixer_types ") and said in str(refused.value)


def test_a_config_holds_the_long_form():
    config = build_config("debug", num_hidden_layers=4, mixer_types="ssm,attention", mlp_layer_types="dense*3,moe")
    assert config.mixer_types == ["ssm", "attention"] * 2
    assert config.mlp_layer_types == ["dense"] * 3 + ["moe"]
