"""Files of a search that its driver has left torn."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

from cluster.search_state import keep_whole, put_back


def write(place: Path, at: int, **files: bytes) -> None:
    place.mkdir(exist_ok=True)
    for name, content in files.items():
        path = place / name.replace("__", ".")
        path.write_bytes(content)
        os.utime(path, ns=(at, at))


def state(trials: int) -> bytes:
    return json.dumps({"trials": trials}).encode()


def read(path: Path) -> object:
    return json.loads(path.read_bytes())


def test_the_newest_whole_state_comes_back(tmp_path: Path) -> None:
    place, copies = tmp_path / "tune", tmp_path / "copies"
    assert not keep_whole(place, copies)
    for number in (1, 2, 3):
        write(place, number, **{"experiment_state-1__json": state(number), "searcher__pkl": pickle.dumps(number)})
        assert keep_whole(place, copies) and not keep_whole(place, copies)
    assert sorted(path.name for path in copies.iterdir()) == ["2", "3"]
    write(place, 4, **{"experiment_state-1__json": state(4)[:-1]})
    assert not keep_whole(place, copies)
    write(place, 4, **{"experiment_state-1__json": state(4), "searcher__pkl": pickle.dumps("torn")[:-3]})
    assert not keep_whole(place, copies)
    assert put_back(place, copies)
    # All of one time: not the newest state of trials with an older searcher's.
    assert read(place / "experiment_state-1.json") == {"trials": 3}
    assert pickle.loads((place / "searcher.pkl").read_bytes()) == 3


def test_what_is_whole_is_left_as_it_is(tmp_path: Path) -> None:
    place, copies = tmp_path / "tune", tmp_path / "copies"
    write(place, 1, **{"experiment_state-1__json": state(1)})
    assert keep_whole(place, copies)
    write(place, 2, **{"experiment_state-1__json": state(2)})
    assert put_back(place, copies) and read(place / "experiment_state-1.json") == {"trials": 2}


def test_a_torn_first_state_of_a_start_leaves_the_starts_before(tmp_path: Path) -> None:
    place, copies = tmp_path / "tune", tmp_path / "copies"
    write(place, 1, **{"experiment_state-1__json": state(1)})
    assert keep_whole(place, copies)
    write(place, 2, **{"experiment_state-2__json": b""})
    assert put_back(place, copies)
    assert [path.name for path in place.iterdir()] == ["experiment_state-1.json"]


def test_a_search_that_had_not_begun_is_no_search(tmp_path: Path) -> None:
    place = tmp_path / "tune"
    assert not put_back(place, tmp_path / "copies")
    write(place, 1, **{"tuner__pkl": pickle.dumps(1), "experiment_state-1__json": b'{"tri'})
    assert not put_back(place, tmp_path / "copies")
