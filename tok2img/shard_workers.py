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
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

logger = logging.getLogger(__name__)
MOST_LOST = 3  # workers in a row, without a piece done in between
LOOK_EVERY = 0.5  # seconds
PR_SET_PDEATHSIG = 1
KILLED = object()


class Worker:
    """A process, the pipe to it, and the piece it is at."""

    def __init__(self, work: Callable[[int], Any]):
        may_fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
        context: Any = multiprocessing.get_context("fork" if may_fork else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, os.getpid(), work), daemon=True)
        self.process.start()
        theirs.close()
        self.number = -1

    def begin(self, number: int) -> None:
        """Give it a piece."""
        self.number = number
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


def in_workers(work: Callable[[int], Any], numbers: Sequence[int], *, num_proc: int) -> Iterator[Any]:
    """What `work` returns for each of the numbers, in the order in which they are done; a worker that is killed is replaced.

    Raises:
        RuntimeError: where workers are killed again and again; and what `work` raises.
    """
    waiting, workers, num_lost = deque(numbers), list[Worker](), 0
    try:
        while waiting or workers:
            while waiting and len(workers) < num_proc:
                workers.append(Worker(work))
                workers[-1].begin(waiting.popleft())
            ready = wait([worker.pipe for worker in workers])
            for worker in [each for each in workers if each.pipe in ready]:
                result = worker.result()
                num_lost = 0 if result is not KILLED else lost(num_lost, num_proc)
                if isinstance(result, Exception):
                    raise result
                if result is KILLED:
                    waiting.appendleft(worker.number)
                if result is KILLED or not waiting:
                    workers.remove(worker)
                    worker.end()
                else:
                    worker.begin(waiting.popleft())
                if result is not KILLED:
                    yield result
    finally:
        for worker in workers:
            worker.end()


def lost(before: int, num_proc: int) -> int:
    """Count a worker that was killed; RuntimeError where it is one too many."""
    logger.warning("a worker was killed; its piece is done again")
    if before + 1 >= MOST_LOST:
        raise RuntimeError(f"workers were killed {before + 1} times: too little memory for {num_proc} of them?")
    return before + 1


def serve(pipe: Connection, parent: int, work: Callable[[int], Any]) -> None:
    """Do the pieces that come through the pipe, in one thread: a fork inherits torch's pool without its threads."""
    torch.set_num_threads(1)
    leave_with(parent)
    while True:
        number = pipe.recv()
        try:
            pipe.send(work(number))
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits for it
            pipe.send(error)


def leave_with(parent: int) -> None:
    """See to it that this process ends when its parent does: at once on Linux, so that what begins a job anew meets none of the old."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
