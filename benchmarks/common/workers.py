"""Jobs, in this process or in others: what is done shows at once, and all of it ends when it is asked to."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm


def each_done(jobs: Sequence[Callable[[], Any]], lasts: str, workers: int = 1) -> Iterator[Any]:
    """Yield the results of jobs as they are done, with a bar on stderr that rows printed meanwhile do not meet.

    Args:
        jobs: What to do.
        lasts: How long all of it takes, as :func:`begin` says it.
        workers: Processes; one means this one.
    """
    name = begin(lasts)
    with tqdm(total=len(jobs), desc=name, unit="part", leave=False, mininterval=0) as bar:
        for found in (job() for job in jobs) if workers == 1 else _by_processes(jobs, workers):
            bar.update()
            if sys.stderr.isatty():
                bar.clear()
            yield found
            if sys.stderr.isatty():
                bar.refresh()


def begin(lasts: str) -> str:
    """Say on stderr how long this benchmark takes, and let Ctrl-C and SIGTERM end it at once; returns its name.

    Left alone, Lightning only notes a SIGTERM while a Trainer runs, and forgets it if that run ends before its next batch.
    """
    file = Path(sys.argv[0])
    name = file.parent.name if file.stem == "__main__" else file.stem
    print(f"{name}: about {lasts} on one core", file=sys.stderr, flush=True)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    return name


def _by_processes(jobs: Sequence[Callable[[], Any]], workers: int) -> Iterator[Any]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            for done in as_completed([pool.submit(job) for job in jobs]):
                yield done.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise
