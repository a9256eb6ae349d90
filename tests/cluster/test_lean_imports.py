"""What is left out is not loaded, and is there again afterwards."""

import importlib
import sys

import pytest

from cluster.lean_imports import load_uncompiled, without_modules


def test_a_module_left_out_is_there_again_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with without_modules("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with without_modules("colorsys"):  # loaded before: nothing is to be gained
        import colorsys
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


def test_a_module_is_loaded_without_its_compiler(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "compiler_of_ours.py").write_text("def compile(fast=True):\n    raise RuntimeError('it compiles')\n")
    kernels = "import compiler_of_ours\n\n@compiler_of_ours.compile(fast=False)\ndef double(x):\n    return 2 * x\n"
    (tmp_path / "kernels_of_ours.py").write_text(kernels)
    compiler = importlib.import_module("compiler_of_ours")
    load_uncompiled("kernels_of_ours", compiler)
    assert sys.modules["kernels_of_ours"].double(2) == 4
    with pytest.raises(RuntimeError, match="it compiles"):  # as before
        compiler.compile()
