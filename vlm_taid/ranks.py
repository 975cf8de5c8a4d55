"""The process group of a launcher's ranks: joined where nobody has, left in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

LETTING_GO = 0.5  # seconds in which gloo's threads can have Python's lock; milliseconds do but on a loaded machine


def left_in_order(command: Callable[[], int]) -> int:
    """Runs a rank's command; leaves a process group that it began, while the interpreter is whole. Returns its code.

    A thread of gloo tells of a collective's end first and lets go of its tensors after that, with Python's lock. One
    that wants the lock while the interpreter ends is ended by it, which C++ takes for a fault: the process aborts, with
    its work done, and its launcher reports a failure. Groups can outlive ``destroy_process_group``, in a model under
    DDP for one, and their threads with them.

    A command that failed does not leave it: the others may be in a collective, and are not to be waited for.
    """
    ours = not dist.is_initialized()
    code = command()
    if code == 0 and ours and dist.is_initialized():
        _leave()
    return code


def _leave() -> None:
    dist.destroy_process_group()
    time.sleep(LETTING_GO)


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the launcher's ranks if there are several and nobody has yet; says whether this is rank 0."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if started:
            _leave()
