"""What this floor says when the cluster, a disk or a server cannot do what was asked."""

from pathlib import Path


class ClusterError(RuntimeError):
    """A user's mistake or a missing resource; the message is one line naming field, value and remedy."""


class CheckpointDamaged(ClusterError):
    """A checkpoint that must not be used.

    `folder` is the checkpoint, `file` the relative path of what is wrong in it, `reason` says how.
    """

    def __init__(self, folder: Path | str, file: str, reason: str):
        self.folder = Path(folder)
        self.file = file
        self.reason = reason
        super().__init__(
            f"checkpoint={folder} is damaged: {file} {reason}; use an older checkpoint, or delete that folder"
        )

    def __reduce__(self):
        # By default an exception is pickled with its message, which this constructor does not take.
        return type(self), (self.folder, self.file, self.reason)


class Stopped(Exception):
    """Work was told to stop from outside before its end; nothing is wrong."""
