"""Many small independent computations, on all the threads that torch may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from tqdm import tqdm

X = TypeVar("X")
Y = TypeVar("Y")

MOST = 8
"""Workers: each holds its item's arrays, some 100 MB."""


def each(fn: Callable[[X], Y], items: Sequence[X], progress: str) -> Iterator[Y]:
    """`fn` of every item, in order, by as many workers as torch may use threads (at most MOST), each with one.

    `progress`: what the bar on stderr is called, "" for none. Threads inside such small products wait for one
    another, on a busy machine for longer than they work; whole items do not. And the numbers are the same for any
    number of workers.
    """
    n = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(n, MOST), initializer=torch.set_num_threads, initargs=(1,))
    try:
        results = map(fn, items) if n == 1 else pool.map(fn, items)
        yield from tqdm(results, progress, len(items), disable=None if progress else True)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n)  # MKL's is one for all threads
