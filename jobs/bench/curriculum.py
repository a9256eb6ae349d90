"""``mmada bench curriculum``: steps to a held-out accuracy, with the levels of a task mixed or one after the other.

The study ``curriculum`` of the catalogue, with five seeds: every variant is a whole run of ``mmada train``.
"""

from __future__ import annotations


def run(arguments: list[str]) -> int:
    """Train all variants with all seeds and print two tables; 0."""
    from jobs.studies.run import run as run_study

    return run_study("curriculum", arguments, verb="bench", seeds=5)
