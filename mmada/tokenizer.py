"""The byte tokenizer and the one registry of special ids.

Ids:  [ 8 special | 256 bytes | image codes ... ]
        0 .. 7      8 .. 263    264 ..

Text becomes its UTF-8 bytes, nothing else: there is no vocabulary to learn and no text that cannot be written.
Special tokens exist as ids only. The characters "<pad>" in a text are five bytes, not a special token, unless a caller
asks with `split_special_tokens=False`.
"""

import codecs
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import AddedToken

from mmada.errors import DataError

SPECIAL_TOKENS = (
    "<pad>",
    "<begin_of_text>",
    "<end_of_text>",
    "<mask>",
    "<begin_of_image>",
    "<end_of_image>",
    "<reserved_0>",
    "<reserved_1>",
)
PAD_ID, BEGIN_OF_TEXT_ID, END_OF_TEXT_ID, MASK_ID, BEGIN_OF_IMAGE_ID, END_OF_IMAGE_ID = range(6)
BYTE_OFFSET = len(SPECIAL_TOKENS)
IMAGE_CODE_OFFSET = BYTE_OFFSET + 256

# Undecodable bytes travel through Python strings as lone surrogates (file names, command lines): give them back.
_ENCODE_ERRORS = "surrogateescape"


class ByteTokenizer(PreTrainedTokenizer):
    """Bytes as tokens, in transformers' tokenizer interface.

    `encode(text)` gives the begin-of-text id and the UTF-8 bytes; no end-of-text, which is the model's to predict.
    `decode` replaces what is not valid UTF-8 by U+FFFD; `bytes_from_ids` is exact for any bytes.

    Args:
        num_image_codes: how many image codes follow the bytes in the vocabulary.
    """

    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # a decoder continues at the right edge, so prompts of a batch are padded at the left

    def __init__(self, num_image_codes: int = 0, **kwargs: Any) -> None:
        if num_image_codes < 0:
            raise ValueError(f"num_image_codes={num_image_codes} is negative; use 0 or more")
        self.num_image_codes = num_image_codes
        self._tokens = [
            *SPECIAL_TOKENS,
            *map(chr, range(256)),
            *(f"<image_code_{k}>" for k in range(num_image_codes)),
        ]
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._added_tokens_decoder = {
            i: AddedToken(token, special=True, normalized=False) for i, token in enumerate(SPECIAL_TOKENS)
        }
        roles = {"pad_token": PAD_ID, "bos_token": BEGIN_OF_TEXT_ID, "eos_token": END_OF_TEXT_ID, "mask_token": MASK_ID}
        for role, i in roles.items():
            kwargs.setdefault(role, SPECIAL_TOKENS[i])
        kwargs.setdefault("extra_special_tokens", list(SPECIAL_TOKENS[BEGIN_OF_IMAGE_ID:]))
        kwargs.setdefault("split_special_tokens", True)
        kwargs.setdefault("special_tokens_pattern", "bos")
        super().__init__(num_image_codes=num_image_codes, **kwargs)

    @property
    def vocab_size(self) -> int:
        """264 plus the image codes; tokens that a user adds come after and count in `len(tokenizer)` only."""
        return IMAGE_CODE_OFFSET + self.num_image_codes

    def get_vocab(self) -> dict[str, int]:
        """Token to id. A byte's token is the character of the same number, as in ByT5."""
        return {**self._ids, **self.added_tokens_encoder}

    def image_code_id(self, code: int) -> int:
        """Token id of image code `code`, 0 <= code < num_image_codes."""
        if not 0 <= code < self.num_image_codes:
            raise ValueError(f"image code {code} is outside 0..{self.num_image_codes - 1} (num_image_codes)")
        return IMAGE_CODE_OFFSET + code

    def image_code_of(self, token_id: int) -> int:
        """The image code that a token id stands for: the inverse of `image_code_id`."""
        if not IMAGE_CODE_OFFSET <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is no image code; those are {IMAGE_CODE_OFFSET}..{self.vocab_size - 1}"
            )
        return token_id - IMAGE_CODE_OFFSET

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of raw bytes as uint16, without begin or end: what preparing a corpus uses."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET)

    def bytes_from_ids(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes among `ids`, exactly; special tokens and image codes stand for no bytes and are left out."""
        ids_N = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        is_byte_N = (ids_N >= BYTE_OFFSET) & (ids_N < IMAGE_CODE_OFFSET)
        return (ids_N[is_byte_N] - BYTE_OFFSET).astype(np.uint8).tobytes()

    # What PreTrainedTokenizer asks of a subclass.

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text.encode("utf-8", _ENCODE_ERRORS).decode("latin-1"))

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of a list of tokens; bytes that are not valid UTF-8 become U+FFFD."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        text = []
        for is_byte, run in groupby(ids, key=lambda i: BYTE_OFFSET <= i < IMAGE_CODE_OFFSET):
            if is_byte:
                text.append(self.bytes_from_ids(run).decode("utf-8", errors="replace"))
            elif not skip_special_tokens:
                text.extend(self.convert_ids_to_tokens(list(run)))
            else:  # image codes are no text either; a token that a user added is
                added = [i for i in run if i >= self.vocab_size]
                text.extend(self.convert_ids_to_tokens(added, skip_special_tokens=True))
        return "".join(text)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Nothing to write: tokenizer_config.json says it all."""
        return ()


class IncrementalDecoder:
    """Ids in, text out, as they come: for printing a text while it is generated.

    What cannot be shown yet is held back: the first bytes of a character whose last bytes have not come, or, with a
    tokenizer that is not of bytes, anything that decodes to a trailing U+FFFD. Special tokens are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._num_context_ids = 0  # ids already shown and kept, since a subword's text depends on what precedes it

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        new_ids = [int(i) for i in ids]
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(self._tokenizer.bytes_from_ids(new_ids))
        self._ids += new_ids
        text = self._text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[self._num_context_ids :]
        self._num_context_ids = len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD. The decoder can be used again afterwards."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(b"", final=True)
        text = self._text()
        self._ids, self._num_context_ids = [], 0
        return text

    def _text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._num_context_ids], skip_special_tokens=True)
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)[len(shown) :]


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name: "bytes", a folder with a saved tokenizer, or a name on the Hugging Face hub.

    Raises:
        DataError: no tokenizer can be had under that name.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if _is_path(name_or_path) and not Path(name_or_path).expanduser().is_dir():
        raise DataError(
            f"data.tokenizer={name_or_path}: no such folder; use bytes, a folder with a saved tokenizer, "
            "or a tokenizer's name on the Hugging Face hub"
        )
    folder = Path(name_or_path).expanduser()
    try:
        if '"ByteTokenizer"' in _tokenizer_config(folder):
            return ByteTokenizer.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name_or_path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"data.tokenizer={name_or_path}: no tokenizer could be loaded ({reason}); use bytes, a folder "
            "with a saved tokenizer, or a tokenizer's name on the Hugging Face hub"
        ) from error


def register_tokenizer(config_class: type) -> None:
    """Lets `AutoTokenizer.from_pretrained` find `ByteTokenizer` in folders whose config is a `config_class`."""
    AutoTokenizer.register(config_class, tokenizer_class=ByteTokenizer, exist_ok=True)


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _tokenizer_config(folder: Path) -> str:
    file = folder / "tokenizer_config.json"
    return file.read_text(encoding="utf-8") if file.is_file() else ""
