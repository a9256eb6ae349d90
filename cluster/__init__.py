"""How work runs on Ray: sessions, checkpoints, tracking. Heavy parts are imported from their own modules."""

from cluster.errors import CheckpointDamaged, ClusterError

__all__ = ["CheckpointDamaged", "ClusterError"]
