"""DataLoader workers and signals."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Callable


def leave_sigterm(then: Callable[[int], None] | None, worker: int) -> None:
    """Workers leave SIGTERM, which launchers send to all processes, to their rank: it needs them for its last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if then is not None:
        then(worker)


@atexit.register
def _end_workers() -> None:
    """multiprocessing ends daemons by SIGTERM and then waits: a run that failed amid an epoch would never exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would report the kill as a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
