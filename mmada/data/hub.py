"""Texts of a Hugging Face data set, through `datasets`, which keeps them memory-mapped in its own cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmada.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def hub_texts(path: str, config_name: str | None, split: str | None, text_field: str) -> Iterator[object]:
    """The values of column `text_field`, row by row.

    Raises:
        DataError: no such data set, configuration, split or column, or its files cannot be read.
    """
    dataset = _load(path, config_name, split)
    if text_field not in dataset.column_names:
        raise DataError(
            f"data.text_field={text_field}: no such field in {path}; use one of {', '.join(dataset.column_names)}"
        )
    for rows in dataset.select_columns([text_field]).iter(batch_size=256):
        yield from rows[text_field]


def _load(path: str, config_name: str | None, split: str | None) -> Dataset:
    import datasets

    bars_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(path, config_name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise _explained(error, path, config_name, split) from error
    finally:
        if bars_shown:
            datasets.enable_progress_bars()
    if isinstance(loaded, datasets.Dataset):
        return loaded
    names = list(loaded)
    if "train" not in names and len(names) > 1:
        raise DataError(f"data.split is missing and {path} has several; use one of {', '.join(names)}")
    return loaded["train" if "train" in names else names[0]]


def _explained(error: Exception, path: str, config_name: str | None, split: str | None) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if split is not None and ("split" in reason or "instruction" in reason):
        return DataError(f"data.split={split}: {reason}; use a split that {path} has")
    named = f"data.path={path}" + (f", data.config_name={config_name}" if config_name else "")
    return DataError(
        f"{named}: the data set cannot be loaded ({reason}); give the name of a data set on the "
        "Hugging Face hub (and a configuration it has), or a folder that holds one"
    )
