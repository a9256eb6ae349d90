"""Ray's access token, for a cluster that is spoken to over HTTP: found where Ray itself would look."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cluster.errors import ClusterError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HOW_TO_GIVE = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds it"


@dataclass(frozen=True)
class AccessToken:
    """A token, which no message may show, and where it was found, which every message may."""

    value: str
    source: str


def access_token(address: str) -> AccessToken | None:
    """The token for the cluster at a URL, or None.

    RAY_AUTH_TOKEN comes first, then the file of RAY_AUTH_TOKEN_PATH. The one in ~/.ray is what Ray guards clusters on
    this machine with; it goes to another machine where RAY_AUTH_MODE=token asks for it, and nowhere with "disabled".

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names no file that holds a token.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return AccessToken(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH", ""):
        try:
            value = Path(path).expanduser().read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ClusterError(
                f"RAY_AUTH_TOKEN_PATH={path} cannot be read ({reason}); name the token's file"
            ) from error
        if not value:
            raise ClusterError(f"RAY_AUTH_TOKEN_PATH={path} is empty; name the file that holds the token")
        return AccessToken(value, f"RAY_AUTH_TOKEN_PATH={path}")
    usual = Path("~/.ray/auth_token").expanduser()
    if usual.is_file() and (mode == "token" or urlsplit(address).hostname in LOOPBACK):
        value = usual.read_text().strip()
        return AccessToken(value, str(usual)) if value else None
    return None
