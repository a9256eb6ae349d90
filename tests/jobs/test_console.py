"""The lines of a run on a plain stream."""

from io import StringIO

from jobs.console import RunLine


def test_a_silence_is_spoken_of_less_and_less_often():
    stream = StringIO()
    with RunLine(stream, lambda row: []) as line:
        for seconds in range(0, 1000):
            line.silence(seconds)
        line.silence(0.5)  # something was heard
        line.silence(130)
    spoken = stream.getvalue().splitlines()
    assert [text.split(":")[0] for text in spoken] == [
        f"nothing from the workers for {seconds} s" for seconds in (120, 240, 480, 960, 130)
    ]
    assert all("Ctrl-C" in text for text in spoken)
