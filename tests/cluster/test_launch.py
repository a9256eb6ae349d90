"""The listener between workers and driver; whole runs are in ``tests/jobs/test_train.py``."""

import time
from queue import Queue

from cluster.launch import _Listener


def test_silence_is_told_with_its_seconds_and_ends_with_a_message():
    queue, heard, silent = Queue(), [], []
    listener = _Listener(queue, heard.append, lambda seconds: silent.append((len(heard), seconds)))
    listener.start()
    while len(silent) < 3:
        time.sleep(0.05)
    queue.put({"step": 1})
    while silent[-1][0] == 0:
        time.sleep(0.05)
    listener.close()
    assert heard == [{"step": 1}] and listener.failure is None
    before = [seconds for count, seconds in silent if count == 0]
    assert before == sorted(before) and before[-1] >= 1.5
    assert next(seconds for count, seconds in silent if count == 1) < before[-1]
