"""Predicting text: the next token of prepared documents, measured in bits per held-out byte."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.entropy_model import settle_threshold
from jobs.evaluation import bits_per_byte
from jobs.objectives.language_model import LanguageModelObjective
from jobs.objectives.objective import LabelledRows, Place
from jobs.prepared_data import cache_dir, text_source
from jobs.recipe import Recipe
from mmada.data import PackedRows, PreparedText, load_tokenizer, open_prepared, prepare

if TYPE_CHECKING:
    from cluster.engine import Engine
    from mmada.pretrained import TrainableModel

_XZ_LIMIT = 64 * 2**20  # bytes of held-out text up to which the comparison with xz is worth its time


class TextObjective(LanguageModelObjective):
    """``train.objective=language_model`` on text."""

    held_out_metric = "bits_per_byte"
    rows: PackedRows

    def __init__(self, recipe: Recipe, text: PreparedText) -> None:
        rows, folder = text.train.rows(recipe.train.sequence_length), text.folder.resolve()
        super().__init__(recipe, load_tokenizer(recipe.data.tokenizer), text.fingerprint, rows, folder)
        self.text = text

    @classmethod
    def prepare(cls, recipe: Recipe) -> TextObjective:
        """Turn the text into tokens on disk, unless they are there."""
        tokenizer = load_tokenizer(recipe.data.tokenizer)
        return cls(recipe, prepare(text_source(recipe), tokenizer, cache_dir(recipe), held_out=recipe.data.held_out))

    @classmethod
    def open(cls, recipe: Recipe, prepared: Path | None) -> TextObjective:
        """Map the tokens that are on disk."""
        assert prepared is not None
        return cls(recipe, open_prepared(prepared))

    def announcement(self) -> str:
        """In bytes."""
        return f"{self.text.train.num_bytes:,} bytes to train on, {self.text.held_out.num_bytes:,} held out"

    def headline(self, value: float) -> str:
        """In bits per byte."""
        return f"held out {value:.3f} bits/byte"

    def closing(self, metrics: dict[str, float]) -> str:
        """Beside what a general compressor needs."""
        compared, text = "", self.text.held_out_text_path
        if text.stat().st_size <= _XZ_LIMIT:
            compared = f" (xz -9 on the same text: {xz_bits_per_byte(text):.2f})"
        return f"{metrics['bits_per_byte']:.3f} bits per held-out byte{compared}"

    def what_next(self, mmada: str, checkpoint: str) -> list[str]:
        """A sample of its text."""
        return [f'sample    {mmada} generate {checkpoint} "The "']

    def rows_of(self, source: str, length: int) -> PackedRows:
        """The text cut into rows of this length."""
        return self.rows if length == self.rows.sequence_length else self.text.train.rows(length)

    def settle(self, model: TrainableModel, saved: Path | None) -> list[str]:
        """The threshold of byte patches, on a sample of the text."""
        return settle_threshold(model, self.rows, saved)

    def evaluate(self, engine: Engine, place: Place, batch_rows: int, max_rows: int | None) -> dict[str, float]:
        """Bits per held-out byte."""
        stream, rows = self.text.held_out, self.held_out()[""]
        bits = bits_per_byte(
            engine.forward, rows, num_bytes=stream.num_bytes, batch_rows=batch_rows, max_rows=max_rows, place=place
        )
        return {"bits_per_byte": bits}

    def held_out(self) -> dict[str, LabelledRows]:
        """The held-out text."""
        return {"": self.text.held_out.rows(self.recipe.train.sequence_length)}


def xz_bits_per_byte(text: Path) -> float:
    """What ``xz -9`` needs for the text, in bits per byte."""
    content = text.read_bytes()
    return 8 * len(lzma.compress(content, preset=9)) / len(content)
