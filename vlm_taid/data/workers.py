"""DataLoader workers and signals."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import signal
from multiprocessing.context import ForkContext, ForkProcess

from torch.utils.data import DataLoader

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_heap(unused: int = 512 * 2**20) -> None:
    """Lets a worker reuse the memory of its last batch.

    glibc gives large blocks back to the system at once, and a batch's pixels then cost thousands of page faults anew.

    Args:
        unused: bytes at the heap's end that are not given back, under 2 GiB.
    """
    if hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, unused)


def deaf(loader: DataLoader) -> DataLoader:
    """A loader whose workers are of ``DeafContext``, where workers are forked."""
    if loader.num_workers and multiprocessing.get_start_method() == "fork":
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        loader.multiprocessing_context = inner.multiprocessing_context = DeafContext()
    return loader


class _DeafProcess(ForkProcess):
    def run(self) -> None:
        keep_heap()
        super().run()

    def start(self) -> None:
        # blocked before the fork, and so from the worker's first instruction on
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class DeafContext(ForkContext):
    """Workers keep their heap, and leave SIGTERM, which launchers send to all processes, to their rank.

    It needs them for its last step.
    """

    Process = _DeafProcess


@atexit.register
def _end_workers() -> None:
    """multiprocessing ends daemons by SIGTERM and then waits: a run that failed amid an epoch would never exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader's handler would report the kill as a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
