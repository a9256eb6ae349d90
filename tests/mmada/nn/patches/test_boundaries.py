"""Where patches end: published values, transformers' patcher, and rules that never look ahead."""

import numpy as np
import pytest
import torch
from transformers.models.blt.modeling_blt import BltPatcher, process_patch_lengths

from mmada.config_parts import PatchSettings
from mmada.nn.patches.boundaries import byte_classes, entropies, mean_patch_size, patch_ends, threshold_for_size
from mmada.tokenizer import ByteTokenizer

H = (9, 0.5, 2, 2.1, 0.2, 0.3, 3, 0.1)
RULES = [
    {"mode": "static", "size": 3},
    {"mode": "space"},
    {"mode": "entropy", "threshold": 1.3},
    {"mode": "monotonic", "threshold": 0.4},
    {"mode": "combined", "threshold": 1.3, "threshold_add": 0.2},
    {"mode": "entropy", "threshold": 2.3, "max_size": 3},
    {"mode": "space", "max_size": 2},
]


def starts_of(settings, reading):
    """Starts of patches within a row: 0, and wherever the byte before ended one."""
    ends = patch_ends(settings, torch.arange(len(reading))[None], torch.as_tensor(reading)[None])[0]
    return [0, *(int(end) + 1 for end in ends[:-1].nonzero())]


def lengths_of(ends_BT):
    """Lengths of the patches in each row, the last one as far as it goes, zeros behind."""
    rows = []
    for ends in ends_BT.clone():
        ends[-1] = True
        rows.append(torch.diff(ends.nonzero()[:, 0], prepend=torch.tensor([-1])))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def random_reading(settings, shape, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 3, shape) if settings.mode == "space" else torch.rand(shape, dtype=torch.float64) * 3


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        (PatchSettings(mode="entropy", threshold=1.3354), [0, 1, 3, 4, 7]),
        (PatchSettings(mode="monotonic", threshold=1), [0, 1, 2, 3, 7]),
        (PatchSettings(mode="combined", threshold=1.3354, threshold_add=1), [0, 1, 2, 7]),
        (PatchSettings(mode="static", size=3), [0, 1, 4, 7]),
        (PatchSettings(mode="entropy", threshold=1.3354, max_size=2), [0, 1, 3, 4, 6, 7]),
    ],
)
def test_known_values(settings, starts):
    assert starts_of(settings, H) == starts


def test_rises_equal_the_papers_loop():
    """The rules on rises, byte by byte: ``forced`` are the starts that the paper's code sets before it asks."""
    entropy = np.random.default_rng(0).random(200) * 3
    forced = {0, 1, 2}
    monotonic, combined = set(forced), set(forced)
    for start in range(3, 200):
        rise = entropy[start - 1] - entropy[start - 2]
        if rise > 0.4:
            monotonic.add(start)
        if rise > 0.2 and entropy[start - 1] > 1.3 and start - 1 not in forced:
            combined.add(start)
    assert starts_of(PatchSettings(mode="monotonic", threshold=0.4), entropy) == sorted(monotonic)
    settings = PatchSettings(mode="combined", threshold=1.3, threshold_add=0.2)
    assert starts_of(settings, entropy) == sorted(combined)


@pytest.mark.parametrize("max_size", [0, 1, 3, 4])
def test_entropy_rule_equals_transformers(max_size):
    """Row by row: in a batch transformers gives shorter rows a byte too many."""
    settings = PatchSettings(mode="entropy", threshold=2.2, max_size=max_size)
    for seed in range(4):
        entropy = random_reading(settings, (1, 100), seed)
        theirs = BltPatcher.patch_lengths_from_entropies(entropy, 100, patch_size=4, threshold=2.2)
        theirs = process_patch_lengths(theirs, max_size or None)
        ours = lengths_of(patch_ends(settings, torch.arange(100)[None], entropy))
        assert ours.tolist() == [[length for length in theirs[0].tolist() if length]]
        assert ours.sum() == 100


def test_words_of_a_text():
    """A patch is a word with what parts it from the next; further space-like bytes lead the next patch."""
    text = "a bc,  déf=1"
    ids = torch.from_numpy(ByteTokenizer().encode_bytes(text.encode()).astype(np.int64))[None]
    ends = patch_ends(PatchSettings(mode="space"), torch.arange(ids.shape[1])[None], byte_classes(ids))
    pieces = text.encode().decode("latin-1")
    ends_at = ends[0].nonzero()[:, 0].tolist()
    assert [pieces[a + 1 : b + 1].encode("latin-1") for a, b in zip([-1, *ends_at], ends_at, strict=False)] == [
        b"a", b" ", b"bc,", b"  d\xc3", b"\xa9f=",
    ]  # fmt: skip


def test_classes_of_all_bytes():
    """Against Python's own tables: ASCII letters and digits, and continuation bytes 80 to BF, are inside words."""
    classes = byte_classes(torch.arange(270))
    for byte in range(256):
        in_word = (byte < 128 and chr(byte).isalnum()) or 0x80 <= byte < 0xC0
        assert classes[byte + 8] == (0 if in_word else 1), byte
    assert (classes[:8] == 2).all() and (classes[264:] == 2).all()


def test_special_tokens_and_image_codes_end_patches():
    ids = torch.tensor([[1, 100, 101, 3, 4, 264, 265, 102, 103]])
    ends = patch_ends(PatchSettings(mode="space"), torch.arange(9)[None], byte_classes(ids))
    assert ends[0].tolist() == [True, False, False, True, True, True, True, False, False]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_prefixes_are_patched_alike(rule):
    settings = PatchSettings(**rule)
    reading = random_reading(settings, (3, 63))
    whole = patch_ends(settings, torch.arange(63)[None], reading)
    for length in (1, 2, 3, 17, 62):
        prefix = patch_ends(settings, torch.arange(length)[None], reading[:, :length])
        assert torch.equal(prefix, whole[:, :length])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_going_on_equals_the_whole(rule):
    settings = PatchSettings(**rule)
    reading = random_reading(settings, (3, 63))
    whole = patch_ends(settings, torch.arange(63)[None], reading)
    for cut in (1, 2, 3, 30):
        column = torch.arange(cut)
        last_end = torch.where(whole[:, :cut], column, -1).amax(dim=1)
        rest = patch_ends(
            settings, torch.arange(cut, 63)[None], reading[:, cut:], reading[:, cut - 1], cut - 1 - last_end
        )
        assert torch.equal(rest, whole[:, cut:])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_document_starts_anew(rule):
    settings = PatchSettings(**rule)
    reading = random_reading(settings, (2, 40))
    index = torch.cat([torch.arange(11), torch.arange(1), torch.arange(28)])[None]
    packed = patch_ends(settings, index, reading)
    pieces = [patch_ends(settings, torch.arange(p.shape[1])[None], p) for p in reading.split([11, 1, 28], dim=1)]
    assert torch.equal(packed, torch.cat(pieces, dim=1))


def test_entropies_are_those_of_the_distribution():
    logits = torch.randn(2, 5, 264, dtype=torch.float64)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropies(logits), expected, rtol=1e-12, atol=0)
    assert entropies(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("rule", RULES[2:5], ids=str)
def test_threshold_gives_the_wanted_size(rule):
    settings = PatchSettings(**{**rule, "size": 6.5})
    entropy = random_reading(settings, (4, 2000))
    index = torch.arange(2000)[None].expand(4, -1)
    settings.threshold = threshold_for_size(settings, index, entropy)
    assert abs(mean_patch_size(settings, index, entropy) - 6.5) < 0.05


def test_a_size_out_of_reach_is_refused():
    settings = PatchSettings(mode="entropy", size=9, max_size=4)
    with pytest.raises(ValueError, match=r"patches\.size=9 cannot be had.*1\.00 to 4\.00 bytes"):
        threshold_for_size(settings, torch.arange(400)[None], torch.rand(1, 400))
