"""From a recipe's ``data`` section to prepared text on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.recipe import Recipe

if TYPE_CHECKING:
    from mmada.data import PreparedText, TextSource


def cache_dir(recipe: Recipe) -> Path:
    """Where prepared text lies, shared by all runs of one ``run.dir``."""
    return recipe.run_dir.parent / ".data"


def text_source(recipe: Recipe) -> TextSource:
    """The recipe's ``data`` section in the words of ``mmada.data``."""
    from mmada.data import TextSource

    data = recipe.data
    return TextSource(
        kind=data.source,
        path=data.path,
        text_field=data.text_field,
        split=data.split,
        config_name=data.config_name,
        limit_documents=data.limit_documents,
    )


def find_prepared(recipe: Recipe) -> PreparedText | None:
    """The recipe's text where a run has prepared it already; nothing is read or written otherwise."""
    if recipe.data.source in ("tasks", "mixture") or recipe.train.objective == "reward":
        return None
    from mmada.data import load_tokenizer, open_prepared
    from mmada.data.sources import describe
    from mmada.data.tokenizing import tokenizer_identity

    folders = [meta.parent for meta in cache_dir(recipe).glob("*/meta.json")]
    if not folders:
        return None
    source = json.loads(json.dumps(describe(text_source(recipe))))
    tokenizer = tokenizer_identity(load_tokenizer(recipe.data.tokenizer))
    for folder in folders:
        prepared = open_prepared(folder)
        meta = prepared.metadata
        if (meta["source"], meta["tokenizer"], meta["held_out"]["share"]) == (source, tokenizer, recipe.data.held_out):
            return prepared
    return None
