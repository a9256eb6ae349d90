"""The byte tokenizer: ids, exact round trips, what transformers expects of it, and text that arrives in parts."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from mmada.errors import DataError
from mmada.tokenizer import (
    BYTE_OFFSET,
    SPECIAL_TOKENS,
    ByteTokenizer,
    IncrementalDecoder,
    load_tokenizer,
    register_tokenizer,
)

EVERY_BYTE = bytes(range(256))
MIXED_TEXT = "naïve café — 10 € 😀 e\u0301 \N{HANGUL SYLLABLE GAG}\0\r\n end"


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="module")
def subword_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2's, small enough that most characters are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the café and the end of the 😀"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_ids_are_where_the_registry_says(tokenizer):
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")}
    assert named == {"pad": 0, "bos": 1, "eos": 2, "mask": 3}
    assert tokenizer.convert_tokens_to_ids(["<begin_of_image>", "<end_of_image>"]) == [4, 5]
    assert sorted(tokenizer.all_special_ids) == list(range(8))
    assert BYTE_OFFSET == 8
    assert (tokenizer.vocab_size, len(tokenizer)) == (264, 264)
    assert ByteTokenizer(num_image_codes=5).vocab_size == len(ByteTokenizer(num_image_codes=5)) == 269


def test_encode_is_begin_of_text_and_the_utf8_bytes(tokenizer):
    assert tokenizer.encode("Aé") == [1, 8 + 0x41, 8 + 0xC3, 8 + 0xA9]
    assert tokenizer.encode("Aé", add_special_tokens=False) == [73, 203, 177]
    assert tokenizer.encode("") == [1]
    assert tokenizer("A").data == {"input_ids": [1, 73], "attention_mask": [1, 1]}


def test_every_byte_sequence_comes_back_exactly(tokenizer):
    noise = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    for data in (b"", EVERY_BYTE, noise):
        ids = tokenizer.encode_bytes(data)
        assert ids.dtype == np.uint16
        assert ids.tolist() == [byte + 8 for byte in data]
        assert tokenizer.bytes_from_ids(ids) == data
        assert tokenizer.bytes_from_ids(iter([1, *ids.tolist(), 2])) == data
        assert tokenizer.decode(ids.tolist()) == data.decode("utf-8", errors="replace")


def test_text_comes_back_exactly(tokenizer):
    assert tokenizer.decode(tokenizer.encode(MIXED_TEXT), skip_special_tokens=True) == MIXED_TEXT
    plain = tokenizer.encode_bytes(MIXED_TEXT.encode()).tolist()
    assert tokenizer.encode(MIXED_TEXT, add_special_tokens=False) == plain
    batch = [MIXED_TEXT, "", "a b"]
    assert tokenizer.batch_decode(tokenizer(batch)["input_ids"], skip_special_tokens=True) == batch


def test_undecodable_bytes_of_a_command_line_come_back_exactly(tokenizer):
    argument = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert tokenizer.bytes_from_ids(tokenizer.encode(argument)) == b"caf\xe9"


def test_special_tokens_spelled_in_a_text_are_plain_bytes(tokenizer):
    text = "".join(SPECIAL_TOKENS)
    assert min(tokenizer.encode(text, add_special_tokens=False)) >= BYTE_OFFSET
    assert min(tokenizer(text, add_special_tokens=False)["input_ids"]) >= BYTE_OFFSET
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.encode("<pad>A", add_special_tokens=False, split_special_tokens=False) == [0, 73]


def test_decode_shows_or_skips_what_is_no_byte():
    tokenizer = ByteTokenizer(num_image_codes=3)
    ids = [1, 73, 4, 264, 266, 5, 73, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "AA"
    shown = "<begin_of_text>A<begin_of_image><image_code_0><image_code_2><end_of_image>A<end_of_text>"
    assert tokenizer.decode(ids) == shown
    assert tokenizer.decode(np.array(ids)) == shown
    assert tokenizer.decode(73) == "A"


def test_padding_is_left_unless_asked_otherwise(tokenizer):
    batch = tokenizer(["A", "AA"], padding=True, return_tensors="np")
    assert batch["input_ids"].tolist() == [[0, 1, 73], [1, 73, 73]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    right = ByteTokenizer(padding_side="right")(["A", "AA"], padding=True)
    assert right["input_ids"] == [[1, 73, 0], [1, 73, 73]]


def test_vocabulary_is_a_bijection():
    tokenizer = ByteTokenizer(num_image_codes=7)
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(271))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(list(range(271)))) == list(range(271))


def test_image_codes_and_ids_are_a_bijection():
    tokenizer = ByteTokenizer(num_image_codes=16)
    ids = [tokenizer.image_code_id(k) for k in range(16)]
    assert ids == list(range(264, 280))
    assert [tokenizer.image_code_of(i) for i in ids] == list(range(16))
    for wrong in (-1, 16):
        with pytest.raises(ValueError, match=r"outside 0\.\.15"):
            tokenizer.image_code_id(wrong)
    for wrong in (263, 280):
        with pytest.raises(ValueError, match=r"264\.\.279"):
            tokenizer.image_code_of(wrong)
    with pytest.raises(ValueError, match="num_image_codes=-1"):
        ByteTokenizer(num_image_codes=-1)


def test_added_tokens_follow_the_vocabulary(tokenizer):
    assert tokenizer.add_tokens(["<think>"]) == 1
    assert len(tokenizer) == 265
    ids = tokenizer.encode("A<think>", split_special_tokens=False)
    assert ids == [1, 73, 264]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A<think>"


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    ByteTokenizer(num_image_codes=4, padding_side="right").save_pretrained(tmp_path)
    loaded = ByteTokenizer.from_pretrained(tmp_path)
    assert (loaded.num_image_codes, loaded.padding_side, len(loaded)) == (4, "right", 268)
    assert loaded.get_vocab() == ByteTokenizer(num_image_codes=4).get_vocab()
    assert loaded.encode("<pad>é") == ByteTokenizer().encode("<pad>é")
    assert sorted(loaded.all_special_ids) == list(range(8))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (json.loads((f / "tokenizer_config.json").read_text()) for f in (tmp_path, tmp_path / "again"))
    assert {key: again[key] for key in first} == first


def test_auto_tokenizer_finds_it_once_registered(tmp_path):
    class ByteModelConfig(PreTrainedConfig):
        model_type = "byte_model_of_this_test"

    AutoConfig.register(ByteModelConfig.model_type, ByteModelConfig)
    register_tokenizer(ByteModelConfig)
    register_tokenizer(ByteModelConfig)  # twice does no harm
    ByteTokenizer(num_image_codes=2).save_pretrained(tmp_path)
    ByteModelConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is ByteTokenizer
    assert loaded.vocab_size == 266


def _pushed_one_by_one(decoder: IncrementalDecoder, ids: list[int]) -> list[str]:
    return [decoder.push([i]) for i in ids]


def test_incremental_decoder_holds_back_incomplete_characters(tokenizer):
    decoder = IncrementalDecoder(tokenizer)
    assert _pushed_one_by_one(decoder, tokenizer.encode("a€b")) == ["", "a", "", "", "€", "b"]
    assert decoder.finish() == ""
    assert decoder.push(tokenizer.encode_bytes("€".encode()[:2])) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(tokenizer.encode("new")) == "new"


def test_incremental_decoder_agrees_with_decode_on_any_bytes(tokenizer):
    ids = tokenizer.encode_bytes(np.random.default_rng(1).integers(0, 256, 2000, dtype=np.uint8).tobytes()).tolist()
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(_pushed_one_by_one(decoder, ids)) + decoder.finish() == tokenizer.decode(ids)


def test_incremental_decoder_works_for_subwords(subword_tokenizer):
    ids = subword_tokenizer.encode(MIXED_TEXT)
    assert len(ids) > len(MIXED_TEXT.split())
    decoder = IncrementalDecoder(subword_tokenizer)
    parts = _pushed_one_by_one(decoder, [*ids, subword_tokenizer.eos_token_id])
    assert "".join(parts) == MIXED_TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert decoder.push(subword_tokenizer.encode("Ω")[:1]) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"


def test_load_tokenizer_by_name_and_folder(tmp_path, subword_tokenizer):
    assert type(load_tokenizer("bytes")) is ByteTokenizer
    ByteTokenizer(num_image_codes=9).save_pretrained(tmp_path / "bytes")
    loaded = load_tokenizer(str(tmp_path / "bytes"))
    assert (type(loaded), len(loaded)) == (ByteTokenizer, 273)
    subword_tokenizer.save_pretrained(tmp_path / "subword")
    loaded = load_tokenizer(str(tmp_path / "subword"))
    assert loaded.encode(MIXED_TEXT) == subword_tokenizer.encode(MIXED_TEXT)


def test_load_tokenizer_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "missing"), "./missing", str(tmp_path / "empty"), "no-such-tokenizer-here"):
        with pytest.raises(DataError) as caught:
            load_tokenizer(name)
        message = str(caught.value)
        assert message.startswith(f"data.tokenizer={name}: ")
        assert "use bytes" in message
        assert "\n" not in message
