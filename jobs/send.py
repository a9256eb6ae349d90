"""``mmada send``: what a run could not tell MLflow while it went on."""

from __future__ import annotations

import sys
from pathlib import Path

from cluster.tracking_writer import send_rest


def run(run_dir: str, uri: str | None) -> int:
    """Send it and say what was sent; 1 if something is left or was refused.

    Raises ClusterError for a folder that is no run's, a run that goes on, and a server that does not answer.
    """
    done = send_rest(Path(run_dir), uri)
    if not (done.sent or done.left or done.refused):
        print(f"nothing is left to send: {done.uri} has all of {run_dir}")
        return 0
    if done.sent:
        print(f"sent to {done.uri}: {done.sent}")
    for line in done.refused:
        print(f"refused by {done.uri}: {line}", file=sys.stderr)
    if done.left:
        print(f"still left ({done.trouble}): {done.left}; give the command again later", file=sys.stderr)
    return 1 if done.left or done.refused else 0
