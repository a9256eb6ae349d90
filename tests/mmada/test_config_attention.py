"""What the config refuses of attention, and how it says so."""

import pytest
from transformers import modeling_rope_utils

from mmada.presets import build_config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"sliding_window": 0}, "sliding_window=0 is too small; use 1 or more"),
        ({"sparse_random_blocks": -1}, "sparse_random_blocks=-1 is too small; use 0 or more"),
        ({"sparse_window_blocks": 0}, "sparse_window_blocks=0 is too small; use 1 or more"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 is not positive; use 50"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping=0 is not positive; use 30"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance=16 is not above half of"),
        ({"mixer_types": "multiscale"}, "window_sizes=[64, 256, 1024, -1] does not divide num_key_value_heads=2"),
        ({"mixer_types": "hybrid", "hybrid": {"attention": "multiscale"}}, "give one of [1, 2] windows"),
        ({"mixer_types": "multiscale", "window_sizes": [0, -1]}, "window_sizes holds 0; use 1 or more, or -1"),
        (
            {"attn_implementation": "blockwise", "attention_normalizer": "sparsemax"},
            "attention_normalizer=sparsemax is beyond attn_implementation=blockwise; use sdpa",
        ),
        (
            {"attn_implementation": "flex_attention", "attention_dropout": 0.1},
            "attention_dropout=0.1 is beyond attn_implementation=flex_attention; use sdpa",
        ),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters.rope_type=ntk needs rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type=yarn needs rope_parameters.factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "rope_parameters.factor=0 is not a positive number; use 4.0",
        ),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_parameters.rope_theta=-1.0 is not a positive number"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": 2.0}, "head_dim": 2}, "head_dim=2 leaves rope_type=ntk"),
    ],
)
def test_attention_that_cannot_be_built_is_refused_in_one_line(overrides, said):
    with pytest.raises(ValueError) as refused:
        build_config("debug", **overrides)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_windows_by_head_are_looked_at_only_where_they_are_built():
    assert build_config("debug").window_sizes == [64, 256, 1024, -1]
    assert build_config("debug", mixer_types="multiscale", window_sizes=[8, -1]).window_sizes == [8, -1]


def test_a_static_ntk_scaling_is_known_to_transformers(monkeypatch):
    """Which warns about types that it does not know, and about keys that a type has not."""
    warnings = []
    monkeypatch.setattr(modeling_rope_utils.logger, "warning", warnings.append)
    rope = {"rope_type": "ntk", "rope_theta": 10_000.0, "factor": 4.0}
    assert build_config("debug", rope_parameters=rope).rope_parameters["factor"] == 4.0
    assert warnings == []
    build_config("debug", rope_parameters={**rope, "beta": 1.0})
    assert len(warnings) == 1 and "beta" in warnings[0]
