"""Checkpoints that are whole or not there: written beside, listed in a manifest, renamed; resume takes a whole one."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

MANIFEST = "complete.json"
PARTIAL = ".partial"
LOCK = ".lock"
LITTLE = 2**16  # bytes: a disk with no more is full


def publish(partial: Path, final: Path, world_size: int) -> None:
    """Writes the manifest of a finished folder, makes it durable, and renames it to its place."""
    files = {str(f.relative_to(partial)): f.stat().st_size for f in sorted(partial.rglob("*")) if f.is_file()}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"world_size": world_size, "files": files}, indent=1))
    for path in [*(partial / name for name in files), manifest]:
        _sync(path)
    for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(folder)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(final.parent)


@contextmanager
def alone_in(run: Path, patience: float = 60) -> Iterator[None]:
    """Keeps other processes out of a run's folder: of a run whose launcher alone was killed, the ranks may go on.

    Args:
        run: the run's folder, made if it is not there.
        patience: seconds to wait for another process to end; a stopped one may still be saving.

    Raises:
        InputError: another process has the folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience
    with open(run / LOCK, "a+") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, whatever ends it
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    break  # a file system without locks
                if time.monotonic() > end:
                    file.seek(0)
                    raise InputError(
                        f"{run}: another process trains in this folder ({file.read() or 'unknown'}): wait for it, or "
                        "end it with all ranks, or choose another training.output_dir"
                    ) from error
            time.sleep(0.5)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextmanager
def full_disk_named(run: Path) -> Iterator[None]:
    """Says of an error that the disk was full, what is kept, and what to do; what was half written is removed.

    Args:
        run: the run's folder, with its checkpoints.

    Raises:
        InputError: in the place of whatever a writing library raised.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full and shutil.disk_usage(run if run.exists() else run.absolute().anchor).free > LITTLE:
            raise
        shutil.rmtree(run / PARTIAL, ignore_errors=True)
        kept = newest_whole(run)
        raise InputError(
            f"{run}: the disk is full ({str(error).strip().splitlines()[0]}). "
            + (f"{kept.name} is whole" if kept is not None else "There is no whole checkpoint yet")
            + ": free space, or set training.save_total_limit, and run the same command to go on"
        ) from error


def newest_whole(run: Path, warn: Callable[[str], None] = warnings.warn) -> Path | None:
    """The newest checkpoint of a run whose files are all there in their sizes, or None.

    Args:
        run: the run's folder.
        warn: is told of each broken checkpoint that is passed over.
    """
    found = [
        (int(m[1]), path) for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        problem = broken(path)
        if problem is None:
            return path
        warn(f"{path} is not whole ({problem}): resuming from the checkpoint before it")
    return None


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}"
    for name, size in files.items():
        try:
            actual = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes, not {size}"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
