"""What stands for the components of a reward, on texts where the value is known."""

import math

import pytest

from mmada.training.reward_proxies import ByteBigrams, correctness, creativity, faithfulness


def test_creativity_is_distinct_2_over_characters():
    assert creativity("abcd") == 1.0
    assert creativity("abab") == pytest.approx(2 * 2 / 3 - 1)  # ab, ba, ab
    assert creativity("aaaaa") == pytest.approx(2 * 1 / 4 - 1)
    assert creativity("a") == creativity("") == 1.0


def test_faithfulness_counts_characters_as_often_as_the_prompt_has_them():
    assert faithfulness("word: poy", "yop") == 1.0
    assert faithfulness("poy", "yopyop") == pytest.approx(0.0)  # three of six
    assert faithfulness("poy", "xz") == -1.0 == faithfulness("poy", "")


def test_correctness_spans_what_a_verifier_gives():
    assert (correctness(0.0), correctness(0.5), correctness(1.0)) == (-1.0, 0.0, 1.0)


def test_bits_of_a_bigram_model_by_hand():
    model = ByteBigrams(["ab"])  # start-a, a-b, b-end, once each
    seen = -math.log2(2 / 258)
    assert model.bits_per_symbol("ab") == pytest.approx(seen) == pytest.approx(model.typical_bits)
    unseen = -math.log2(1 / 258)  # after a byte that was seen before another one
    never = math.log2(257)  # after a byte that was never seen
    assert model.bits_per_symbol("ax") == pytest.approx((seen + unseen + never) / 3)


def test_coherence_falls_from_typical_text_to_noise():
    model = ByteBigrams([str(number) for number in range(500)])
    assert model.coherence("123") > 0.7
    assert -1 <= model.coherence("q~\x01") < -0.8
    assert model.coherence("1q3") < model.coherence("123")
    with pytest.raises(ValueError):
        ByteBigrams([])
