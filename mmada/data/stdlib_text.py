"""Text that every Python carries: the topics of `help()` and the docstrings of the standard library."""

import ast
import hashlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data import topics

from mmada.errors import DataError

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def stdlib_fingerprint() -> dict[str, str]:
    """What tells one Python build's text from another's: its version and a hash over its sources. Takes 50 ms."""
    digest = hashlib.sha256()
    for name in sorted(topics.topics):
        digest.update(hashlib.sha256(f"{name}\0{topics.topics[name]}".encode()).digest())
    for name, file in _module_files():
        digest.update(hashlib.sha256(name.encode() + b"\0" + file.read_bytes()).digest())
    return {"library": f"{platform.python_implementation()} {platform.python_version()}", "sha256": digest.hexdigest()}


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each documented module and each help topic, sorted by name: 2.3 MB in all, 4 s the first time.

    A module's text is its docstrings in the order of the source, a blank line between them. Tests are left out.
    """
    for name, file in _module_files():
        if text := _docstrings(file):
            yield f"module {name}", text
    for name in sorted(topics.topics):
        yield f"topic {name}", topics.topics[name]


def _module_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for top in sorted(root.iterdir()):
        if top.name.removesuffix(".py") not in sys.stdlib_module_names:
            continue
        for file in top.rglob("*.py") if top.is_dir() else [top]:
            parts = file.relative_to(root).with_suffix("").parts
            if file.suffix == ".py" and not _TEST_FOLDERS.intersection(parts[:-1]):
                files.append((".".join(parts).removesuffix(".__init__"), file))
    if not files:
        raise DataError(
            f"data.source=stdlib: this Python has no standard library sources in {root}; "
            "install them, or use data.source=files with data.path"
        )
    return sorted(files)


@cache  # parsing is slow, and the text is read twice
def _docstrings(file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules
        warnings.simplefilter("ignore", DeprecationWarning)  # the same, before Python 3.12
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise DataError(
                f"data.source=stdlib: {file} is not Python ({error}); "
                "repair this Python's installation, or use data.source=files with data.path"
            ) from error
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    docstrings = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(filter(None, docstrings)).encode("utf-8", "replace").decode("utf-8")
