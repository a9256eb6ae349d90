"""Loading libraries without what they load along and nothing here uses: seconds of every worker's start."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def without_modules(*names: str) -> Iterator[None]:
    """Inside the block ``import`` of these finds nothing, unless they have been loaded before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is what import takes for "not there"
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def load_uncompiled(name: str, compiler: ModuleType) -> None:
    """Import a module while ``compiler.compile()``, by which it decorates its kernels, leaves them as they are."""
    own: Any = compiler
    compile_kernels, own.compile = own.compile, lambda *arguments, **options: lambda kernel: kernel
    try:
        importlib.import_module(name)
    finally:
        own.compile = compile_kernels
