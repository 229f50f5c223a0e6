import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tok2img.tokenization import worker_pool
from tok2img.tokenization.worker_pool import imap_unordered, is_worker, iterate_in_process, start_context


def square(number: int) -> int:
    return number**2


def raise_at(bad: int, number: int) -> int:
    if number == bad:
        raise ValueError(f"cannot do {number}")
    time.sleep(0.01)
    return number


def kill_once(marker: Path, number: int) -> int:
    if number == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def count_from(first: int):
    yield from range(first, 10)


def count_and_die_once(marker: Path, first: int):
    for number in range(first, 10):
        yield kill_once(marker, number)


def test_pool_yields_every_result_once():
    assert sorted(imap_unordered(square, range(10), num_proc=3)) == [number**2 for number in range(10)]
    assert not multiprocessing.active_children()


def test_pool_raises_what_the_work_raises_and_ends_its_workers():
    with pytest.raises(ValueError, match="cannot do 2"):
        list(imap_unordered(partial(raise_at, 2), range(100), num_proc=2))
    assert not multiprocessing.active_children()


def test_pool_that_is_closed_early_ends_workers_at_once():
    results = imap_unordered(lambda number: number if number == 0 else time.sleep(60), range(4), num_proc=2)
    started = time.monotonic()
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 20 and not multiprocessing.active_children()


def test_pool_repeats_only_what_a_killed_worker_had_not_returned(tmp_path):
    assert sorted(imap_unordered(partial(kill_once, tmp_path / "killed"), range(8), num_proc=2)) == list(range(8))


def test_workers_use_one_thread_and_know_what_they_are():
    def look(number: int) -> tuple[int, bool]:
        return torch.get_num_threads(), is_worker()

    assert list(imap_unordered(look, range(2), num_proc=2)) == [(1, True)] * 2 and not is_worker()


def test_iteration_in_a_process_keeps_the_order():
    assert list(iterate_in_process(count_from, 10)) == list(range(10))
    assert not multiprocessing.active_children()


def test_iteration_in_a_process_resumes_where_it_was_killed(tmp_path, caplog):
    assert list(iterate_in_process(partial(count_and_die_once, tmp_path / "killed"), 10)) == list(range(10))
    assert "A worker process was killed" in caplog.text


def test_iteration_in_a_process_survives_a_kill_amid_an_item(tmp_path):
    """An item larger than a pipe's buffer whose sender dies while it writes."""

    def items_from(first: int):
        for number in range(first, 2):
            if not (tmp_path / "killed").exists():
                (tmp_path / "killed").touch()
                pid = os.getpid()
                subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {pid}"])  # noqa: S603, S607
            yield bytes(10_000_000) if number == 0 else b"end"

    items = iterate_in_process(items_from, 2)
    receive = Connection.recv

    def slow_receive(connection):
        time.sleep(0.6)
        return receive(connection)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Connection, "recv", slow_receive)
        assert [len(item) for item in items] == [10_000_000, 3]


def test_iteration_in_a_process_raises_what_the_iterator_raises():
    def items_from(first: int):
        yield first
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(iterate_in_process(items_from, 5))


def test_iteration_whose_process_is_killed_again_and_again_ends():
    def items_from(first: int):
        os.kill(os.getpid(), signal.SIGKILL)
        yield first

    with pytest.raises(RuntimeError, match="killed 3 times in a row"):
        list(iterate_in_process(items_from, 5))


class Accelerator:
    def __init__(self, initialized: bool):
        self.is_initialized = lambda: initialized


@pytest.mark.parametrize(
    ("module", "method"),
    [(None, "fork"), (Accelerator(False), "fork"), (Accelerator(True), "spawn"), (object(), "spawn")],
)
def test_processes_are_not_forked_once_an_accelerator_is_in_use(monkeypatch, module, method):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork on this system")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: module is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert start_context().get_start_method() == method


def test_spawned_workers_give_the_same_results(monkeypatch):
    monkeypatch.setattr(worker_pool, "start_context", lambda: multiprocessing.get_context("spawn"))
    assert sorted(imap_unordered(square, range(3), num_proc=2)) == [0, 1, 4]
    assert list(iterate_in_process(count_from, 10)) == list(range(10))


JOB = """
import os, sys, time
from tok2img.tokenization.worker_pool import imap_unordered
def work(number):
    print(os.getpid(), flush=True)
    time.sleep(60)
list(imap_unordered(work, range(4), num_proc=2))
"""


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_a_parent_that_was_killed_or_interrupted(signum):
    job = subprocess.Popen(
        [sys.executable, "-c", JOB],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert job.stdout is not None
    workers = [int(job.stdout.readline()) for _ in range(2)]
    assert all(map(is_alive, workers))
    job.send_signal(signum)
    errors = job.communicate(timeout=20)[1]
    deadline = time.monotonic() + 2
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, workers))
    assert job.returncode == -signum and errors.count("KeyboardInterrupt") == (signum == signal.SIGINT)
