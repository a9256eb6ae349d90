"""What the tests of the jobs share."""

from pathlib import Path

import pytest

from mmada.data import TextSource, load_tokenizer, prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Forty documents of the standard library as bytes, prepared; for reading alone."""
    folder = tmp_path_factory.mktemp("data")
    return prepare(TextSource(kind="stdlib", limit_documents=40), load_tokenizer("bytes"), folder).folder
