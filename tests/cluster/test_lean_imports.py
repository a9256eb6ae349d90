"""What is left out is not loaded, and is there again afterwards."""

import sys

import pytest

from cluster.lean_imports import without_modules


def test_a_module_left_out_is_there_again_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with without_modules("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    with without_modules("colorsys"):  # loaded before: nothing is to be gained
        import colorsys
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)
