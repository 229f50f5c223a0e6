"""Worker processes for work that may be repeated: a process that is killed costs only what it was working on.

`ProcessPoolExecutor` gives a whole pool up when one of its processes dies, for instance when memory runs out. Here the
missing results are then computed by a new pool, so `work` must be idempotent.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

logger = logging.getLogger(__name__)
MAX_CONSECUTIVE_FAILURES = 3

_work: Callable[[int], Any] | None = None  # set in worker processes only


def imap_unordered(work: Callable[[int], Any], numbers: Sequence[int], *, num_proc: int) -> Iterator[Any]:
    """Run `work` on each number in worker processes and yield the results as they complete.

    Args:
        work: An idempotent function. Under fork it is inherited, so it need not be picklable.
        numbers: Distinct arguments of `work`.
        num_proc: Number of processes.

    Raises:
        RuntimeError: If workers are killed `MAX_CONSECUTIVE_FAILURES` times without a result in between.
        Exception: Whatever `work` raises.
    """
    missing, num_failures = list(numbers), 0
    while missing:
        try:
            for number, result in _run_pool(work, tuple(missing), num_proc):
                missing.remove(number)
                num_failures = 0
                yield result
        except BrokenProcessPool as error:
            num_failures = _count_failure(num_failures, num_proc, error)


def iterate_in_process(items_from: Callable[[int], Iterator[Any]], num_items: int) -> Iterator[Any]:
    """Iterate in another process, which prepares the next item while the caller works on the present one.

    This is not a pool of one: items are large, and `ProcessPoolExecutor` waits forever for the rest of a result whose
    sender was killed. A pipe with a single writer ends instead.

    Args:
        items_from: Returns an iterator that starts at an item's number. It is called again if the process is killed.
        num_items: Number of items.

    Raises:
        RuntimeError: If the process is killed `MAX_CONSECUTIVE_FAILURES` times without an item in between.
        Exception: Whatever the iterator raises.
    """
    num_done = num_failures = 0
    context = start_context()
    while num_done < num_items:
        receiver, sender = context.Pipe(duplex=False)
        lifeline, parent_end = context.Pipe(duplex=False)
        process = context.Process(
            target=_send_items, args=(items_from, num_done, receiver, sender, lifeline, parent_end), daemon=True
        )
        process.start()
        sender.close()  # the process must hold the only writing end, or its death would go unnoticed
        try:
            while num_done < num_items:
                try:
                    item = receiver.recv()
                except (EOFError, OSError) as error:  # OSError: killed amid an item
                    num_failures = _count_failure(num_failures, 1, error)
                    break
                if isinstance(item, Exception):
                    raise item
                num_done, num_failures = num_done + 1, 0
                yield item
        finally:
            process.kill()
            process.join()
            for end in (receiver, lifeline, parent_end):
                end.close()


def is_worker() -> bool:
    """Return True in the processes that `imap_unordered` starts."""
    return _work is not None


def start_context() -> Any:
    """Return the fastest safe way to start processes: fork, but spawn once an accelerator is in use.

    Drivers of accelerators do not survive a fork.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = None if device is None else torch.get_device_module(device)
    # MPS has no `is_initialized`: take it for in use wherever it exists.
    in_use = module is not None and getattr(module, "is_initialized", lambda: True)()
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("fork" if can_fork and not in_use else "spawn")


def _run_pool(work: Callable[[int], Any], numbers: Sequence[int], num_proc: int) -> Iterator[tuple[int, Any]]:
    """Yield each number with its result; BrokenProcessPool after the last result if a worker was killed."""
    context, broken = start_context(), None
    lifeline, parent_end = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        min(num_proc, len(numbers)),
        mp_context=context,
        initializer=_init_worker,
        initargs=(work, lifeline, parent_end),  # not with each call: `work` holds whole models
    )
    try:
        numbers_of = {executor.submit(_call_work, number): number for number in numbers}
        for future in as_completed(numbers_of):
            if isinstance(future.exception(), BrokenProcessPool):
                broken = future.exception()
                continue
            yield numbers_of[future], future.result()
    finally:
        # An error or Ctrl-C must not wait for minutes of work under way: closing the lifeline ends the workers.
        parent_end.close()
        executor.shutdown(cancel_futures=True)
        lifeline.close()
    if broken is not None:
        raise broken


def _init_worker(work: Callable[[int], Any], lifeline: Connection, parent_end: Connection) -> None:
    global _work  # noqa: PLW0603 - the executor has no other place for what its processes share
    _work = work
    _prepare_process(lifeline, parent_end)


def _call_work(number: int) -> Any:
    assert _work is not None
    return _work(number)


def _send_items(
    items_from: Callable[[int], Iterator[Any]],
    first: int,
    receiver: Connection,
    sender: Connection,
    lifeline: Connection,
    parent_end: Connection,
) -> None:
    receiver.close()
    _prepare_process(lifeline, parent_end)
    try:
        for item in items_from(first):
            sender.send(item)
    except Exception as error:  # noqa: BLE001 - raised in the parent
        sender.send(error)


def _prepare_process(lifeline: Connection, parent_end: Connection) -> None:
    """Set up a new worker: one thread, no signal handlers of the parent, and an end when the parent ends.

    Args:
        lifeline: Reading end of a pipe to which nothing is ever written. It ends when its last writing end is closed.
        parent_end: This process's copy of the writing end.
    """
    parent_end.close()
    # A fork inherits torch's thread pool without its threads: the first parallel loop would wait forever.
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which Ctrl-C reaches as well, ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the executor ends the others when one was killed

    def exit_with_parent() -> None:
        with suppress(EOFError, OSError):
            lifeline.recv_bytes()
        os._exit(1)

    # Needed because an idle worker waits on a queue whose writing end it also holds, so it would outlive a killed
    # parent. It must end immediately: a restarted job must not meet workers that still write.
    threading.Thread(target=exit_with_parent, daemon=True).start()


def _count_failure(num_before: int, num_proc: int, error: Exception) -> int:
    """Return the number of failures in a row, with this one."""
    logger.warning("A worker process was killed; its work is repeated.")
    if num_before + 1 >= MAX_CONSECUTIVE_FAILURES:
        raise RuntimeError(
            f"Worker processes were killed {num_before + 1} times in a row, probably by too little memory for "
            f"{num_proc} of them. Use fewer (num_proc)."
        ) from error
    return num_before + 1
