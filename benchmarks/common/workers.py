"""Jobs in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def each_done(jobs: Sequence[Callable[[], Any]], workers: int) -> Iterator[Any]:
    """Yield the results of jobs as they are done; one worker works in this process."""
    if workers == 1:
        yield from (job() for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            yield done.result()
