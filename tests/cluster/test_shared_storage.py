"""A worker's first look: is its folder the driver's?"""

import pytest

from cluster.shared_storage import NotShared, check_mark, on_shared_storage


def test_a_folder_that_is_not_the_drivers_is_named(tmp_path):
    seen = []
    worker = on_shared_storage(seen.append, tmp_path / "run" / "ray")
    worker({"key": 1})
    assert seen == [{"key": 1}]
    mark = tmp_path / "run" / "ray" / ".driver"
    check_mark(mark, mark.read_text(), "head", patience_s=0)
    elsewhere = tmp_path / "elsewhere" / ".driver"  # of a node with a disk of its own
    for written in (None, "of another run"):
        if written is not None:
            elsewhere.parent.mkdir()
            elsewhere.write_text(written)
        with pytest.raises(NotShared) as error:
            check_mark(elsewhere, mark.read_text(), "head", patience_s=0)
        assert str(error.value).startswith(f"run.dir: {elsewhere.parent} on node ")
        assert "is not the folder that the driver on head writes to; put run.dir on storage" in str(error.value)
