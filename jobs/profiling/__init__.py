"""``mmada profile``: what each part of a model costs, and what the whole costs without it."""
