"""Objectives: each a small file returning a scalar and its parts."""
