"""DataLoader workers and signals."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from multiprocessing.context import ForkContext, ForkProcess


class _DeafProcess(ForkProcess):
    def start(self) -> None:
        # blocked before the fork, and so from the worker's first instruction on
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class DeafContext(ForkContext):
    """Workers leave SIGTERM, which launchers send to all processes, to their rank: it needs them for its last step."""

    Process = _DeafProcess


@atexit.register
def _end_workers() -> None:
    """multiprocessing ends daemons by SIGTERM and then waits: a run that failed amid an epoch would never exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would report the kill as a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
