"""Placement groups whose maker is dead, given back.

Ray keeps what an actor has reserved until its whole job is over. The guard of ``cluster.placement_cleanup`` gives it
back earlier, but learns of a group only when the workers in it have started: a trial that is killed before would keep
their places from all the others.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group


def orphaned_groups() -> list[PlacementGroup]:
    """Placement groups of this job that are not removed, and whose making actor is dead."""
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    found = []
    for raw in _accessor().get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(raw)
        is_gone = group.state == gcs_pb2.PlacementGroupTableData.REMOVED
        is_ours = group.creator_job_id.hex() == job and not group.is_detached
        has_maker = not ray.ActorID(group.creator_actor_id).is_nil()  # else the driver, which is alive
        if is_ours and not is_gone and has_maker and group.creator_actor_dead:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found


def remove_orphaned_groups() -> int:
    """Give them back; how many there were."""
    groups = orphaned_groups()
    for group in groups:
        remove_placement_group(group)
    return len(groups)


def _accessor() -> Any:
    return ray._private.state.state._connect_and_get_accessor()
