"""The verbs of this folder on ``mmada``'s command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

WHERE = "the cluster's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS)"
SUBMIT = """\
Sends mmada as it stands here, the recipe and the pins that the cluster lacks, and runs VERB there. The job joins the
cluster that it runs in. Relative paths, run.dir among them, are taken from --folder on the cluster. The exit code is
the job's; leaving, by Ctrl-C or a lost connection, does not end it.
"""


def submit(options: argparse.Namespace) -> int:
    """Run a verb on a cluster that is somewhere else."""
    from jobs.cli import VERBS as known
    from jobs.submission.submit import Order, run

    order = Order(
        options.address,
        options.submitted,
        options.target,
        tuple(options.overrides),
        options.folder,
        tuple(options.files),
        options.detach,
    )
    return run(order, known)


def jobs(options: argparse.Namespace) -> int:
    """List a cluster's jobs."""
    from jobs.submission.watch import list_jobs

    return list_jobs(options.address)


def logs(options: argparse.Namespace) -> int:
    """Show what a job writes."""
    from jobs.submission.watch import show_logs

    return show_logs(options.address, options.job, options.follow)


def stop(options: argparse.Namespace) -> int:
    """End a job."""
    from jobs.submission.watch import stop

    return stop(options.address, options.job)


VERBS = {"submit": submit, "jobs": jobs, "logs": logs, "stop": stop}


def add_parsers(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Describe the verbs to ``mmada``; ``add`` makes a verb's parser."""
    each = add("submit", "run a verb on a Ray cluster that is somewhere else")
    each.description, each.formatter_class = SUBMIT, argparse.RawDescriptionHelpFormatter
    address(each)
    each.add_argument("submitted", metavar="VERB", help="train, ppo, tune or evaluate")
    each.add_argument("target", metavar="RECIPE", help="as for VERB; a checkpoint of evaluate lies on the cluster")
    each.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="as for VERB")
    each.add_argument(
        "--folder",
        metavar="DIR",
        help="where relative paths are taken from on the cluster: storage that outlives it and that all its nodes see "
        "(default: MMADA_STORAGE there, or ~/mmada)",
    )
    each.add_argument(
        "--with",
        dest="files",
        metavar="PATH",
        action="append",
        default=[],
        help="a file or folder of the working directory that travels to its like place in --folder: a reward function, "
        "a small data set; may be repeated",
    )
    each.add_argument("--detach", action="store_true", help="do not follow the job")

    address(add("jobs", "list the jobs of a cluster"))
    each = job(add("logs", "show what a job has written"))
    each.add_argument("--follow", action="store_true", help="until the job ends; the exit code is then the job's")
    job(add("stop", "end a job; its run can go on with run.resume=true"))


def address(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a verb have ``--address``."""
    parser.add_argument("--address", metavar="URL", help=WHERE)
    return parser


def job(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a verb have a job and ``--address``."""
    parser.add_argument("job", metavar="ID", help="as `mmada jobs` lists it")
    return address(parser)
