"""Where runs are recorded: is the address right, and does someone answer there?"""

import os
import re
import threading
from pathlib import Path

from cluster.errors import ClusterError

PREFLIGHT_SECONDS = 10.0
WEB = re.compile(r"https?://(\S+@)?(\[[\da-f:]+\]|[^/:\s]+)(:(?P<port>\d+))?(/\S*)?")


def check_uri(uri: str) -> None:
    """Find out within ten seconds whether runs can be recorded there.

    Raises:
        ClusterError: names tracking.uri, what is wrong with it and what to do.
    """
    web = WEB.fullmatch(uri)
    if web:
        _check_server(uri, web["port"])
    elif uri.startswith("sqlite:///") and uri != "sqlite:///":
        _check_file(uri)
    else:
        raise ClusterError(
            f"tracking.uri={shown(uri)} is no place that runs can be recorded in; use http://host:port, "
            "sqlite:///file.db, or leave tracking.uri empty to use a file here"
        )


def _check_server(uri: str, port: str | None) -> None:
    import requests

    outcome = ["does not answer"]

    def ask() -> None:
        try:
            answer = requests.get(f"{uri.rstrip('/')}/health", timeout=PREFLIGHT_SECONDS / 2)
        except requests.exceptions.SSLError:
            outcome[0] = ""  # it answers; whether its certificate is trusted is for MLflow's own settings
        except requests.exceptions.RequestException:
            return
        else:
            wants_login = answer.status_code in (401, 403)  # MLflow's client has the credentials, this request not
            fine = wants_login or (answer.ok and answer.text.strip() == "OK")
            outcome[0] = "" if fine else f"answers, but not as an MLflow server (HTTP {answer.status_code})"

    # In a thread: neither the search for a host's name nor an answer in drops ends with the timeout of requests.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PREFLIGHT_SECONDS)
    if outcome[0]:
        start = f"'mlflow server --port {port}'" if port else "'mlflow server'"
        raise ClusterError(
            f"tracking.uri={shown(uri)} {outcome[0]}; start it with {start} or leave tracking.uri empty to use a file "
            "here"
        )


def _check_file(uri: str) -> None:
    path = ancestor = sqlite_path(uri)
    while not ancestor.exists():
        ancestor = ancestor.parent
    wrong = ""
    if not os.access(ancestor, os.W_OK if ancestor == path else os.W_OK | os.X_OK):
        wrong = f"cannot be written: {ancestor} does not allow it"
    elif ancestor == path and not path.is_file():
        wrong = "is not a file"
    elif ancestor == path:
        with open(path, "rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):  # MLflow would try for more than a minute
                wrong = "is a file of another kind"
    if wrong:
        raise ClusterError(
            f"tracking.uri={uri} {wrong}; name another file, or leave it empty to use one beside run.dir"
        )


def sqlite_path(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute()


def shown(uri: str) -> str:
    """The address without a password that it may hold."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:…@", uri)
