"""Sampling many completions at once; ``mmada.generate`` is the door."""
