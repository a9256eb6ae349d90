"""The YAML that recipes are written in: the core types of YAML 1.2, and no key twice.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``on`` is true, ``1:30`` is ninety and ``2024-05-01`` is a date.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

CORE_TYPES = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class RecipeLoader(yaml.SafeLoader):
    """Reads YAML 1.2's core types; refuses a key that stands twice and a key that is not text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """A whole number in tens, leading zeros or not."""
        return int(self.construct_scalar(node), 10)


class RecipeDumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


for _tag, _pattern, _first in CORE_TYPES:
    for _dialect in (RecipeLoader, RecipeDumper):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", RecipeLoader.construct_decimal)


def parse(text: str) -> Any:
    """The value that ``text`` says. Raises ValueError with the problem and its place, in one line."""
    try:
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{problem}{where}") from error


def dump(values: Any) -> str:
    """``values`` as YAML that ``parse`` reads back unchanged."""
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)
