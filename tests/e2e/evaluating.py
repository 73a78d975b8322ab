"""A rank that evaluates twice: `python -m tests.e2e.evaluating PORT WORDS...`.

In the first evaluation, rank 1 receives TERM while it answers its second batch; the second one ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from medalign import distributed
from medalign.__main__ import main
from medalign.student.model import Student

answer = Student.generate
calls: list[int] = []


def generate(self: Student, *arguments: Any, **options: Any) -> Any:
    calls.append(1)
    if distributed.rank() == 1 and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return answer(self, *arguments, **options)


if __name__ == "__main__":
    port, *words = sys.argv[1:]
    Student.generate = generate  # type: ignore[method-assign]
    sys.stdout.write(f"first {main(words)}\n")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # a rank that ends early ignores them
        signal.signal(number, signal.SIG_DFL)
    os.environ["MASTER_PORT"] = port
    sys.stdout.write(f"second {main(words)} answered {len(calls)}\n")
