"""The job's own side: brings sent files to their place, goes to the job's folder and does there what was asked.

Runs on the cluster as ``python -m jobs.submission.inside FOLDER VERB …``, in the unpacked package.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from jobs.submission.package import FILES, RECIPES, ROOT


def main(arguments: list[str]) -> None:
    """``arguments``: the job's folder and mmada's own command line, in which the recipe sent goes by its bare name."""
    folder, verb, target, *overrides = arguments
    recipe = ROOT / RECIPES / target
    Path(folder).mkdir(parents=True, exist_ok=True)
    sent = ROOT / FILES
    if sent.is_dir():
        shutil.copytree(sent, folder, dirs_exist_ok=True)
    os.chdir(folder)
    sys.path[0] = str(ROOT)  # of -m it was the working directory
    from jobs import cli

    cli.main([verb, str(recipe) if recipe.is_file() else target, *overrides])


if __name__ == "__main__":
    main(sys.argv[1:])
