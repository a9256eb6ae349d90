"""Runs on a cluster that is somewhere else: ``mmada submit``, ``jobs``, ``logs`` and ``stop``."""
