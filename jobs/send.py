"""``mmada send``: what a run could not tell MLflow while it went on."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.tracking_writer import send_rest


def run(run_dir: str, uri: str | None) -> int:
    """Send it and say what was sent; 1 if something is left or was refused.

    Raises ClusterError for a folder that is no run's, a run that goes on, and a server that does not answer.
    """
    outcomes = send_rest(Path(run_dir), uri)
    if not any(each.sent or each.left or each.refused for each in outcomes):
        print(f"nothing is left to send: {outcomes[0].uri} has all of {run_dir}")
    for each in outcomes:
        if each.sent:
            print(f"sent to {each.uri}: {each.sent}")
        for line in each.refused:
            print(f"refused by {each.uri}: {line}", file=sys.stderr)
        if each.left:
            print(f"still left ({each.trouble}): {each.left}; give the command again later", file=sys.stderr)
    return 1 if any(each.left or each.refused for each in outcomes) else 0
