"""What follows from a failure: every rule, and the order of the rules."""

import pytest

from cluster.recovery import Policy, Restart, Shrink, Status, Stop, Wait, decide

ALL = Policy(max_failures=2, sizes=(8,), timeout_s=60)
FEWER = Policy(max_failures=2, sizes=(2, 4, 8), timeout_s=60)


@pytest.mark.parametrize(
    ("policy", "status", "expected"),
    [
        # A worker has died, and there is room for all of them.
        (ALL, Status(failures=1, workers=8, room=8), Restart(8)),
        (ALL, Status(failures=2, workers=8, room=20), Restart(8)),
        (FEWER, Status(failures=1, workers=8, room=9), Restart(8)),
        # Once too often, whatever room there is.
        (ALL, Status(failures=3, workers=8, room=8), Stop()),
        (FEWER, Status(failures=3, workers=8, room=4, in_doubt=True), Stop()),
        (Policy(max_failures=0, sizes=(2, 4)), Status(failures=1, workers=4, room=4), Stop()),
        # A node does not answer: not even where the others have room is anything placed that Ray might put on it.
        (ALL, Status(failures=1, workers=8, room=8, in_doubt=True, waited_s=59), Wait()),
        (ALL, Status(failures=1, workers=8, room=8, in_doubt=True, waited_s=60), Restart(8)),
        # A node is lost: its return is waited for, then fewer workers go on, or none.
        (FEWER, Status(failures=1, workers=8, room=7, waited_s=0), Wait()),
        (FEWER, Status(failures=1, workers=8, room=7, waited_s=59.9), Wait()),
        (FEWER, Status(failures=1, workers=8, room=7, waited_s=60), Shrink(4)),
        (FEWER, Status(failures=1, workers=8, room=4, waited_s=60), Shrink(4)),
        (FEWER, Status(failures=1, workers=8, room=3, waited_s=60), Shrink(2)),
        # Without any time to wait, until what the dead held can have been given back.
        (Policy(max_failures=1, sizes=(2, 4)), Status(failures=1, workers=4, room=2, waited_s=2.9), Wait()),
        (Policy(max_failures=1, sizes=(2, 4)), Status(failures=1, workers=4, room=2, waited_s=3), Shrink(2)),
        # With fewer workers already: all where there is room again, else the same number soon, fewer after the time.
        (FEWER, Status(failures=2, workers=4, room=8), Restart(8)),
        (FEWER, Status(failures=2, workers=4, room=5, waited_s=2.9), Wait()),
        (FEWER, Status(failures=2, workers=4, room=5, waited_s=3), Restart(4)),
        (FEWER, Status(failures=2, workers=2, room=4, waited_s=3), Restart(4)),
        (FEWER, Status(failures=2, workers=4, room=2, waited_s=10), Wait()),
        (FEWER, Status(failures=2, workers=4, room=2, waited_s=61), Shrink(2)),
    ],
)
def test_decisions(policy, status, expected):
    assert decide(status, policy) == expected


def test_a_run_that_finds_no_room_says_which_keys_would_help():
    lost = Status(failures=1, workers=8, room=6, waited_s=60)
    assert decide(lost, ALL) == Stop(
        "there is room for 6 of cluster.workers=8, also after cluster.node_timeout=60 s; add nodes and go on with "
        "run.resume=true, there with fewer cluster.workers"
    )
    nothing = Status(failures=1, workers=8, room=0, waited_s=60)
    assert decide(nothing, FEWER) == Stop(
        "there is room for 0 of cluster.workers=8 and cluster.min_workers leaves none below 2, also after "
        "cluster.node_timeout=60 s; add nodes and go on with run.resume=true"
    )


def test_a_policy_allows_at_least_one_worker():
    for sizes in ((), (0, 2)):
        with pytest.raises(ValueError, match="allows no workers"):
            Policy(max_failures=1, sizes=sizes)
