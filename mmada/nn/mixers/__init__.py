"""Layers that mix information along the sequence."""
