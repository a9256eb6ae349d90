"""``mmada jobs``, ``logs`` and ``stop``, and the following of a job that ``submit`` ends with."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime, timedelta

from cluster.errors import ClusterError
from cluster.ray_jobs import ConnectionLost, Job, RayJobs
from jobs.submission.look import LOOK
from jobs.wording import closest

STOP_TIMEOUT_SECONDS = 90.0


def say(name: str, text: str) -> None:
    """A line about a job, in the manner of a run's own."""
    print(f"{name:<8} {text}", flush=True)


def pick_up(job_id: str, address: str | None, verb: str = "logs", *, follow: bool = True) -> str:
    """The command that goes on with a job. ``address`` as the user gave it: None stands in the environment."""
    where = ["--address", address] if address is not None else []
    return shlex.join(["mmada", verb, job_id, *(["--follow"] if follow else []), *where])


def list_jobs(address: str | None) -> int:
    """Print the jobs that the cluster remembers, the newest first."""
    jobs = RayJobs(address)
    rows = [("job", "status", "started", "took", "what")]
    shown = [job for job in jobs.jobs() if not job.id.startswith(LOOK)]
    rows += [(job.id, _status(job), _started(job), _took(job), _what(job)) for job in shown]
    if len(rows) == 1:
        print(f"no jobs at {jobs.address}")
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    return 0


def show_logs(address: str | None, job_id: str, is_followed: bool) -> int:
    """Print a job's log; followed, until it ends, with its exit code as ours."""
    jobs = RayJobs(address)
    job = find(jobs, job_id)
    if is_followed:
        return follow(jobs, job.id, address)
    text = jobs.logs(job.id)
    _write(text or (job.message.rstrip() + "\n"))
    return 0


def stop(address: str | None, job_id: str) -> int:
    """End a job and wait until it has; one that has ended stays as it is."""
    jobs = RayJobs(address)
    job = find(jobs, job_id)
    if job.has_ended:
        say("job", f"{job.id} has ended already: {_status(job)}")
        return 0
    jobs.stop(job.id)
    job = jobs.wait(job.id, STOP_TIMEOUT_SECONDS)
    if not job.has_ended:
        raise ClusterError(
            f"job={job.id} has not ended within {STOP_TIMEOUT_SECONDS:g} s; look at "
            f"{pick_up(job.id, address, follow=False)}"
        )
    say("job", f"{job.id} {_status(job)} after {_took(job)}; a run of train, ppo or tune goes on with run.resume=true")
    return 0


def find(jobs: RayJobs, job_id: str) -> Job:
    """A job by its name. Raises ClusterError, with the nearest name that there is."""
    try:
        return jobs.job(job_id)
    except ConnectionLost:
        raise
    except ClusterError as error:
        guess = closest(job_id, [job.id for job in jobs.jobs()])
        if guess is None or guess == job_id:
            raise
        raise ClusterError(f"job={job_id} is not known at {jobs.address}; did you mean {guess}?") from error


def follow(jobs: RayJobs, job_id: str, address: str | None) -> int:
    """Print a job's log until it ends; its exit code. Leaving, by Ctrl-C or a lost connection, does not end it."""
    again = pick_up(job_id, address)
    print(f"         leaving does not end it: {again}", flush=True)
    print(f"         to end it: {pick_up(job_id, address, 'stop', follow=False)}", flush=True)
    try:
        job = jobs.follow(job_id, _write)
    except KeyboardInterrupt:
        print(f"\nleft; the job goes on: {again}", file=sys.stderr)
        raise
    except ConnectionLost as error:
        raise ConnectionLost(f"job={job_id} goes on unwatched: {error} Pick it up again: {again}") from error
    say("job", f"{job.id} {_status(job)} after {_took(job)}")
    return job.code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _status(job: Job) -> str:
    words = {"SUCCEEDED": "done", "PENDING": "waits", "RUNNING": "runs", "STOPPED": "stopped"}
    return words.get(job.status, f"failed ({job.code})")


def _started(job: Job) -> str:
    return datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M") if job.started else "-"


def _took(job: Job) -> str:
    return "-" if job.seconds is None else str(timedelta(seconds=round(job.seconds)))


def _what(job: Job) -> str:
    text = " ".join((job.metadata.get("mmada") or job.entrypoint).split())
    return text if len(text) <= 100 else text[:99] + "…"
