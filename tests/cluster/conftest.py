"""A Ray for the tests of one file."""

import pytest

from cluster.session import RaySession


@pytest.fixture(scope="module")
def ray_session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    with RaySession(None, workers=1, cpus_per_worker=1, gpus_per_worker=0, log_dir=folder) as session:
        yield session
