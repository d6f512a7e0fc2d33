"""A program that promotes runs in processes that are killed: `PREFIX CALLS` a line comes in, the exit code goes out.

Each process is killed right after the answer to its CALLSth request to the store (the bucket is the argument). They are
forked from this one, which has no threads yet, so that a try takes no time to start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from botocore.httpsession import URLLib3Session

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks import promote
from tasks.run import Run
from tasks.storage import Store


def die_after(calls: int) -> None:
    """Let this process be killed as soon as so many requests have been answered."""
    send, lock, left = URLLib3Session.send, threading.Lock(), calls

    def counting(*args: object) -> object:
        nonlocal left
        answer = send(*args)
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return answer

    URLLib3Session.send = counting


if __name__ == "__main__":
    store = Store(sys.argv[1])
    _ = store._client
    for line in sys.stdin:
        prefix, calls = line.split()
        child = os.fork()
        if child == 0:
            die_after(int(calls))
            promote.run(Run(store, prefix))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
