"""USR1 and TERM set a flag; a loader's process outlives them, but not its trainer's own TERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from medalign.errors import Preempted, Terminated
from medalign.stop_signals import hold_stop_signals, stop_signals

WORKER = """
import multiprocessing, os, signal, sys, time
from medalign.stop_signals import hold_stop_signals, shield_worker

def work(started, ready):
    started.set()
    time.sleep(float(sys.argv[1]))
    shield_worker(0)
    ready.set()
    time.sleep(60)

if __name__ == "__main__":
    started, ready = multiprocessing.Event(), multiprocessing.Event()
    worker = multiprocessing.Process(target=work, args=(started, ready), daemon=True)
    with hold_stop_signals():
        worker.start()
    started.wait()
    if not float(sys.argv[1]):
        ready.wait()
    print(worker.pid, flush=True)
    sys.stdin.readline()
    ready.wait()
    worker.terminate()
    worker.join(20)
    print(worker.exitcode, flush=True)
"""


def test_signals_are_collected_and_the_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        assert received.request is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received.request is Preempted
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received.request is Terminated  # a job that is canceled must not be queued again
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_nothing_is_changed(caplog):
    caplog.set_level("INFO", logger="medalign")
    before, seen = signal.getsignal(signal.SIGUSR1), []

    def inside() -> None:
        with stop_signals() as received:
            seen.append((received.request, signal.getsignal(signal.SIGUSR1)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(None, before)] and "outside of the main thread" in caplog.text


def test_held_signals_arrive_after_the_context():
    with stop_signals() as received:
        with hold_stop_signals():
            # To this thread: it is the one that holds signals, and other tests may have left threads that take them.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            assert received.request is None
        assert received.request is Preempted
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("delay", [0, 1], ids=["at work", "starting"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_worker_outlives_the_signals_of_a_batch_system(number, delay):
    words = [sys.executable, "-c", WORKER, str(delay)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        os.kill(worker, number)  # from this process, which is not the worker's parent
        time.sleep(0.5)
        os.kill(worker, 0)  # raises if the worker is gone
        output, _ = trainer.communicate("\n", timeout=60)
    assert output.split() == ["0"]  # the trainer's own TERM ended it
