"""A recipe as workers get it: plain values, which mean the same in every process and working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.checkpoint_folder import model_folder
from jobs.recipe import Recipe


def recipe_for_workers(recipe: Recipe) -> dict[str, Any]:
    """The recipe with the folders that it names absolute: workers have a working directory of their own."""
    values = recipe.model_dump()
    named = [("data", "tokenizer"), ("data", "path"), ("model", "entropy_model"), ("train", "start_from")]
    for section, key in [*named, ("ppo", "start_from")]:
        name = (values[section] or {}).get(key)
        if name is not None and (folder := Path(name).expanduser()).exists():
            values[section][key] = str(folder.resolve())
    places = [(values["objectives"] or {}, "safety_reference")]
    for source in (values["data"]["sources"] or {}).values():
        places += [(source, "path"), (source, "difficulty_model")]
    for place, key in places:
        if place.get(key) is not None and (folder := Path(place[key]).expanduser()).exists():
            place[key] = str(folder.resolve())
    for part in (values["reward"] or {}).get("parts", ()):
        if part["kind"] == "model":
            part["name"] = str(model_folder(part["name"]).resolve())
    return values
