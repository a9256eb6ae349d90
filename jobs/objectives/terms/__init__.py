"""Losses that a language model may learn from beside its text; ``table`` lists them."""
