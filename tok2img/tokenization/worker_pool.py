"""Processes that do numbered pieces of work, any of which may be killed.

Each has a pipe of its own: with a shared queue, a process that is killed while it holds the queue's lock stops all others for ever.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

logger = logging.getLogger(__name__)
MOST_LOST = 3  # workers in a row, without a piece done in between
LOOK_EVERY = 0.5  # seconds
PR_SET_PDEATHSIG = 1
KILLED = object()


class Worker:
    """A process, the pipe to it, and the piece it is at, if any."""

    def __init__(self, work: Callable[[int], Any]):
        may_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if may_fork else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, os.getpid(), work), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None

    def begin(self, number: int) -> None:
        """Give it a piece; one that is dead already shows it by its result."""
        self.number = number
        with suppress(ConnectionError):
            self.pipe.send(number)

    def result(self) -> Any:
        """What came of its piece: what `work` returned or raised, or `KILLED`."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            return KILLED

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def imap_unordered(work: Callable[[int], Any], numbers: Sequence[int], *, num_proc: int) -> Iterator[Any]:
    """What `work` returns for each of the numbers, in the order in which they are done; a worker that is killed is replaced.

    Raises:
        RuntimeError: where workers are killed again and again; and what `work` raises.
    """
    waiting, workers, num_lost = deque(numbers), list[Worker](), 0
    try:
        busy = assign_work(workers, waiting, work, num_proc=num_proc)
        while busy:
            results = []
            for worker in wait_ready(busy):
                result = worker.result()
                if result is KILLED:
                    waiting.appendleft(cast(int, worker.number))
                    workers.remove(worker)
                    worker.end()
                    num_lost = lost(num_lost, num_proc)
                    continue
                if isinstance(result, Exception):
                    raise result
                worker.number, num_lost = None, 0
                results.append(result)
            busy = assign_work(workers, waiting, work, num_proc=num_proc)
            yield from results  # while what comes next is under way
    finally:
        for worker in workers:
            worker.end()


def assign_work(
    workers: list[Worker], waiting: deque[int], work: Callable[[int], Any], *, num_proc: int
) -> list[Worker]:
    """Give what is waiting to workers that are free, and to new ones up to `num_proc`; those that have something to do."""
    num_wanted = len(waiting) + sum(worker.number is not None for worker in workers)
    workers += [Worker(work) for _ in range(min(num_wanted, num_proc) - len(workers))]
    for worker in workers:
        if worker.number is None and waiting:
            worker.begin(waiting.popleft())
    return [worker for worker in workers if worker.number is not None]


def wait_ready(workers: Sequence[Worker]) -> list[Worker]:
    """Wait until something came of a piece; the workers whose it is."""
    ready = wait([worker.pipe for worker in workers])
    return [worker for worker in workers if worker.pipe in ready]


def lost(before: int, num_proc: int) -> int:
    """Count a worker that was killed; RuntimeError where it is one too many."""
    logger.warning("a worker was killed; its piece is done again")
    if before + 1 >= MOST_LOST:
        raise RuntimeError(f"workers were killed {before + 1} times: too little memory for {num_proc} of them?")
    return before + 1


def serve(pipe: Connection, parent: int, work: Callable[[int], Any]) -> None:
    """Do the pieces that come through the pipe, in one thread: a fork inherits torch's pool without its threads."""
    torch.set_num_threads(1)
    exit_with_parent(parent)
    while True:
        number = pipe.recv()
        try:
            pipe.send(work(number))
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits for it
            pipe.send(error)


def exit_with_parent(parent: int) -> None:
    """See to it that this process ends when its parent does: at once on Linux, so that what begins a job anew meets none of the old."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
