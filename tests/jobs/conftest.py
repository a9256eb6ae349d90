"""What the tests of the jobs share."""

from pathlib import Path

import pytest

from mmada.data import TextSource, load_tokenizer, prepare
from tests.patience import TEST_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of jobs start whole runs and may take longer than others."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_S))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Forty documents of the standard library as bytes, prepared; for reading alone."""
    folder = tmp_path_factory.mktemp("data")
    return prepare(TextSource(kind="stdlib", limit_documents=40), load_tokenizer("bytes"), folder).folder
