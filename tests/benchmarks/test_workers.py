"""Jobs of the benchmarks: done, shown, and ended."""

import multiprocessing
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from benchmarks.common.workers import each_done

ENDLESS = """
from functools import partial
from time import sleep
from benchmarks.common.workers import each_done
list(each_done([partial(sleep, seconds) for seconds in (0, 600, 600)], "ten minutes", workers={workers}))
"""


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_jobs_are_done_in_turn_under_a_bar_that_says_how_long(capsys):
    assert list(each_done([partial(pow, 2, power) for power in range(4)], "a second")) == [1, 2, 4, 8]
    said = capsys.readouterr()
    assert not said.out and "about a second on one core" in said.err and "0/4" in said.err and "4/4" in said.err


def test_an_error_ends_the_other_processes():
    began = time.monotonic()
    jobs = [partial(time.sleep, 600), partial(divmod, 1, 0), *[partial(time.sleep, 600)] * 3]
    with pytest.raises(ZeroDivisionError):
        list(each_done(jobs, "ten minutes", workers=2))
    assert time.monotonic() - began < 100 and not multiprocessing.active_children()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_ends_all_of_it(number, workers):
    program = subprocess.Popen(
        [sys.executable, "-c", ENDLESS.format(workers=workers)], stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "1/3" not in said:
        letter = program.stderr.read(1)
        assert letter, f"it ended before its first job was done: {said}"
        said += letter
    program.send_signal(number)
    assert "Traceback" not in program.communicate(timeout=100)[1]
    assert program.returncode == 128 + number
