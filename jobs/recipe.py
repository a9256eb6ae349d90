"""Reading a recipe: a YAML file, ``key=value`` overrides, and one clear line for whatever is wrong in them.

``jobs.recipe_schema`` says what may stand in a recipe, ``jobs.recipe_checks`` what must fit together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from jobs import recipe_yaml
from jobs.recipe_schema import RESOLVED_RECIPE, Recipe, RecipeError
from jobs.recipe_schema_stages import StagePresetSection
from jobs.stage_presets import stages_of_preset
from jobs.stages import planned_steps
from jobs.wording import closest, listed, shown, suggestion

__all__ = [
    "RESOLVED_RECIPE",
    "Recipe",
    "RecipeError",
    "load_recipe",
    "load_values",
    "recipe_of",
    "set_key",
    "shipped_recipes",
]

RECIPES = Path(__file__).parent / "recipes"
SPACE = "tune.space."  # what stands behind it is the key of a recipe, dots and all

# What a field wants, by pydantic's name for the mistake.
WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a section; write its keys below it",
    "dict_type": "a section; write its keys below it",
    "list_type": "a list; write it in brackets",
    "model_attributes_type": "a section; write its keys below it",
}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    ``path`` is a file, or the bare name of a recipe that comes with mmada (``quickstart``). ``overrides`` are
    ``section.key=value`` with the value in YAML, or ``section=null`` to leave a section out. Raises RecipeError.
    """
    return recipe_of(load_values(path, overrides))


def recipe_of(values: dict[str, Any]) -> Recipe:
    """The recipe that these values, as they stand in a file, say. Raises RecipeError."""
    return with_planned_steps(with_preset_stages(values))


def load_values(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a recipe's file says, with overrides, before defaults are filled in and types are looked at.

    Raises RecipeError for what cannot be read at all.
    """
    file = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise RecipeError(f"recipe={file} cannot be read ({reason}); give a YAML file") from error
    values = parse(text, f"recipe={file}")
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe={file} holds no sections; write {', '.join(Recipe.model_fields)} with their keys below"
        )
    for override in overrides:
        apply_override(values, override)
    return values


def with_preset_stages(values: dict[str, Any]) -> dict[str, Any]:
    """These values with ``train.stages`` as a list where they name a preset. Raises RecipeError."""
    train, data = values.get("train"), values.get("data")
    stages = train.get("stages") if isinstance(train, dict) else None
    if not isinstance(train, dict) or not isinstance(stages, dict):
        return values
    keys = StagePresetSection.model_fields
    for key in stages.keys() - keys.keys():
        remedy = suggestion(key, keys)
        raise RecipeError(f"train.stages.{key}={shown(stages[key])} is not a key of a preset; {remedy}")
    if "preset" not in stages:
        raise RecipeError(
            f"train.stages={shown(stages)} names no preset; write train.stages={{preset: reasoning}}, say, or a list"
        )
    try:
        section = StagePresetSection.model_validate(stages)
    except ValidationError as error:
        raise RecipeError(first_mistake(error, ("train", "stages"))) from error
    sources = data.get("sources") if isinstance(data, dict) else None
    own = stages_of_preset(section, sources if isinstance(sources, dict) else ())
    return {**values, "train": {**train, "stages": own}}


def with_planned_steps(values: dict[str, Any]) -> Recipe:
    """The recipe of these values; ``train.steps`` is that of its stages where it has any. Raises RecipeError."""
    section = values.get("train")
    train = section if isinstance(section, dict) else {}
    has_stages = train.get("stages") is not None
    said = train.get("steps") if has_stages else None
    if has_stages and said is None:
        values = {**values, "train": {**train, "steps": 1}}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(first_mistake(error)) from error
    if not has_stages:
        return recipe
    planned = planned_steps(recipe.train)
    if said is not None and said != planned:
        raise RecipeError(
            f"train.steps={said} is not what train.stages come to together, {planned}; leave train.steps out"
        )
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": planned})})


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with mmada, by name."""
    return {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(path: str | Path) -> Path:
    """The file that is meant: ``path`` itself, or the shipped recipe of that name."""
    file, shipped = Path(path).expanduser(), shipped_recipes()
    if file.is_file():
        return file
    if str(path) in shipped:
        return shipped[str(path)]
    what = "is a folder" if file.is_dir() else "does not exist"
    remedy = (
        f"did you mean {guess}?"
        if (guess := closest(file.stem, shipped))
        else f"give a YAML file, or {listed(shipped)}"
    )
    raise RecipeError(f"recipe={path} {what}; {remedy}")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in ``values``."""
    key, equals, text = override.partition("=")
    key = key.strip()
    section, dot, field = key.partition(".")
    if not equals:
        raise RecipeError(f"override={override} has no value; write section.key=value, such as train.steps=100")
    if key in Recipe.model_fields and parse(text, f"override={override}") is None:
        values.pop(key, None)
        return
    if not (dot and section and field):
        guess = sections_of(key)
        raise RecipeError(f"override={override} names no section; write {guess or 'section.key'}={text}")
    value = parse(text, f"override={override}")
    if key.startswith(SPACE) and value is None:
        values.get("tune", {}).get("space", {}).pop(key.removeprefix(SPACE), None)
        return
    set_key(values, key, value)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` in ``values``; behind ``tune.space.`` stands one key, dots and all. Raises RecipeError."""
    section, *outer, last = key.split(".", 2) if key.startswith(SPACE) else key.split(".")
    target: Any = values
    path = ""
    for name in (section, *outer):
        path = f"{path}.{name}" if path else name
        target = _entered(target, name, path)
    if isinstance(target, list):
        target[_place_in(target, last, path)] = value
    else:
        target[last] = value


def _entered(outer: Any, name: str, path: str) -> Any:
    """What stands under a name in a mapping (an empty mapping where nothing does) or in a list, and can hold more."""
    if isinstance(outer, list):
        inner = outer[_place_in(outer, name, path.rpartition(".")[0])]
    else:
        if outer.get(name) is None:
            outer[name] = {}
        inner = outer[name]
    if not isinstance(inner, dict | list):
        remedy = f"set {path} itself" if "." in path else "write its keys below it"
        raise RecipeError(f"{path}={shown(inner)} holds no keys; {remedy}")
    return inner


def _place_in(entries: list[Any], name: str, path: str) -> int:
    """The place of an entry by its ``name``, as a stage has one, or by its number from 0."""
    names = [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]
    for place, entry in enumerate(entries):
        if (isinstance(entry, dict) and str(entry.get("name")) == name) or str(place) == name:
            return place
    known = names or [str(place) for place in range(len(entries))]
    raise RecipeError(f"{path}.{name} is no entry of {path}; {suggestion(name, known)}")


def parse(text: str, name: str) -> Any:
    """The value that ``text`` says; ``name`` is what an error begins with."""
    try:
        return recipe_yaml.parse(text)
    except ValueError as error:
        raise RecipeError(f"{name} is no valid YAML: {error}; mend it there") from error


def first_mistake(error: ValidationError, within: tuple[str, ...] = ()) -> str:
    """One line for the mistake to mend first: a misspelt key comes before the one that is then missing.

    ``within``: where in the recipe stands what was validated.
    """
    order: dict[Any, int] = {"extra_forbidden": 0, "missing": 2}
    found: list[Any] = [{**each, "loc": (*within, *each["loc"])} for each in error.errors(include_url=False)]
    mistakes = sorted(found, key=lambda each: order.get(each["type"], 1))
    words = [each for each in mistakes if each["type"] == "literal_error" and place(each) == place(mistakes[0])]
    is_choice = mistakes[0]["type"] in WANTED and words  # a number or a word
    line = describe(mistakes[0], f" or {words[0]['ctx']['expected']}".replace("'", "") if is_choice else "")
    others = {place(mistake) for mistake in mistakes} - {place(mistakes[0])}  # a choice of types is one mistake
    return f"{line} (and {len(others)} more)" if others else line


def place(mistake: Mapping[str, Any]) -> tuple[str, ...]:
    """Where pydantic found it, without the type that it tried there."""
    parts = [str(part) for part in mistake["loc"]]
    return tuple(part for part in parts if not part.startswith(("constrained-", "list[", "literal[")))


def describe(mistake: Mapping[str, Any], or_word: str = "") -> str:
    """Field, value and remedy of one of pydantic's findings; ``or_word``: what else than a number would do."""
    location, kind = list(place(mistake)), mistake["type"]
    field, value = ".".join(location), mistake["input"]
    if kind == "extra_forbidden":
        return describe_unknown(location, value)
    if kind == "missing":
        if len(location) == 1:
            return f"{field} is missing; the recipe needs a section {field}"
        return f"{field} is missing; set it in the recipe or as {field}=… after it"
    if kind in WANTED:
        if kind.startswith("model") or kind in ("dict_type", "list_type"):
            return f"{field}={shown(value)} is not {WANTED[kind]}"
        quotable = kind == "string_type" and isinstance(value, bool | int | float)
        wanted = WANTED[kind] + or_word
        remedy = f"quote it: '{field}=\"{shown(value)}\"'" if quotable else f"write {wanted}"
        return f"{field}={shown(value)} is not {wanted}; {remedy}{' without quotes' * isinstance(value, str)}"
    if kind == "literal_error":
        allowed = property_of(location)["enum"]
        return f"{field}={shown(value)} is not one of {', '.join(allowed)}; {suggestion(str(value), allowed)}"
    if kind == "string_pattern_mismatch" and field == "tasks.template":
        return f"{field}={shown(value)} has no place for the problem; write {{question}} where it shall stand"
    if kind == "string_pattern_mismatch":
        remedy = "use letters, digits, '.', '_' and '-', a letter or digit first"
        return f"{field}={shown(value)} cannot name a folder; {remedy}"
    if kind == "string_too_short":
        return f"{field}={shown(value)} is empty; leave the key out or give it a value"
    if kind == "too_short":
        return f"{field}={shown(value)} is empty; give at least one, or leave the key out"
    return f"{field}={shown(value)} is out of range; use {allowed_range(property_of(location))}"


def describe_unknown(location: list[str], value: Any) -> str:
    """A key or section that no recipe has, with what was probably meant."""
    if len(location) == 1:
        remedy = suggestion(location[0], Recipe.model_fields)
        return f"{location[0]}={shown(value)} is not a section of a recipe; {remedy}"
    section, key = location[0], location[-1]
    if len(location) > 2:
        return f"{'.'.join(location)}={shown(value)} is not a key there; leave it out"
    keys = schema_of(section)["properties"]
    elsewhere = sections_of(key)
    remedy = f"did you mean {elsewhere}?" if elsewhere else suggestion(key, keys, f"{section}.")
    return f"{section}.{key}={shown(value)} is not a key of a recipe; {remedy}"


def sections_of(key: str) -> str | None:
    """``section.key`` where some section has exactly this key."""
    return next((f"{name}.{key}" for name in Recipe.model_fields if key in schema_of(name)["properties"]), None)


def schema_of(section: str) -> dict[str, Any]:
    """JSON schema of one section."""
    annotation = Recipe.model_fields[section].annotation
    (kind,) = [each for each in get_args(annotation) or (annotation,) if each is not type(None)]
    return kind.model_json_schema()


def property_of(location: list[str]) -> dict[str, Any]:
    """JSON schema of one key, without the null that it may also be; also of sections in lists and under names."""
    section = schema_of(location[0])
    definitions, found = section.get("$defs", {}), section

    def plain(schema: dict[str, Any]) -> dict[str, Any]:
        schema = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
        return definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema

    for part in location[1:]:
        inner = found.get("properties", {}).get(part) or found.get("items") or found.get("additionalProperties")
        if not isinstance(inner, dict):
            break
        found = plain(inner)
    return found


def allowed_range(schema: Mapping[str, Any]) -> str:
    """The bounds of a number in words."""
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if "minimum" in schema and "maximum" in schema:
        return f"{low:g} to {high:g}"
    above = "more than" if "exclusiveMinimum" in schema else "at least"
    below = "less than" if "exclusiveMaximum" in schema else "at most"
    words = [f"{above} {low:g}"] if low is not None else []
    if high is not None:
        words.append(f"{below} {high:g}")
    return " and ".join(words)
