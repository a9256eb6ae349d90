"""Settings of byte patches that cannot be built are refused by name."""

import pytest

from mmada.config import MMaDAConfig
from mmada.presets import build_config

GOOD = {"mode": "space", "local_size": 32}


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        ({"mode": "words"}, r"patches\.mode='words' is unknown; use one of none, static, space, entropy"),
        ({"size": 4.5, "mode": "static"}, r"patches\.size=4\.5 is no whole number"),
        ({"local_heads": 3}, r"patches\.local_heads=3 does not cut patches\.local_size=32"),
        ({"local_size": 64}, r"patches\.local_size=64 times patches\.cross_attention_k=2 is not hidden_size=64"),
        ({"hash_sizes": [3, 0]}, r"patches\.hash_sizes=\[3, 0\] holds a size below 1"),
        ({"mode": "entropy"}, r"patches\.entropy_model=null leaves patches\.mode=entropy nothing to ask"),
        (
            {"mode": "combined", "entropy_model": {"vocab_size": 300}},
            r"patches\.entropy_model\.vocab_size=300 is not vocab_size=264",
        ),
        (
            {"mode": "entropy", "entropy_model": {"hidden_size": 64, "num_attention_heads": 4, "patches": {**GOOD}}},
            r"patches\.entropy_model\.patches\.mode=space is not none",
        ),
    ],
)
def test_refusals(patches, message):
    with pytest.raises(ValueError, match=message):
        build_config("debug", patches={**GOOD, **patches})


def test_off_checks_nothing_and_a_good_one_is_kept():
    assert MMaDAConfig(patches={"local_size": 7}).embedding_size == 192
    config = build_config("debug", patches=GOOD)
    assert config.embedding_size == 32 and MMaDAConfig(**config.to_dict()).patches == config.patches
