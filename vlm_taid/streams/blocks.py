"""Shared memory that a data worker uses again.

A DataLoader's worker gives every tensor that it sends new shared memory, whose pages the kernel clears and maps one
by one: for some tens of MiB of pixels that takes longer than to copy them. Here a worker keeps its blocks of shared
memory. What its processors join into large tensors is written into a block at once, the rest of a batch is copied into
one, and a block is free again when the last of its tensors is gone, here and in the process that received them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import get_worker_info

HERE, THERE = 0, 1  # a block's first bytes: whether this process, and the one that received it, has tensors in it
ALIGNED = 64  # bytes: where tensors begin
LARGE = 2**20  # bytes of a joined tensor that is worth a block of its own


class Place(NamedTuple):
    """Where a tensor is: in which of a message's blocks, and from which byte on."""

    block: int
    start: int
    dtype: torch.dtype
    shape: torch.Size


class Blocks:
    """A process's blocks; its threads share them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._lock = threading.Lock()

    def _take(self, size: int, who: int) -> Tensor:
        """A free block with room for ``size`` bytes; one that is too small makes room for a new one."""
        with self._lock:
            free = sorted((block for block in self._blocks if not block[:2].any()), key=len)
            taken = next((block for block in free if len(block) >= ALIGNED + size), None)
            if taken is None:
                taken = _shared(ALIGNED + size + size // 8)  # batches' sizes differ a little
                self._blocks = [block for block in self._blocks if not free or block is not free[-1]] + [taken]
            taken[who] = 1
        return taken

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a block of its own."""
        place = Place(0, ALIGNED, dtype, torch.Size(shape))
        return _at(_leased(self._take(_bytes(place), HERE), HERE), place)

    def send(self, tensors: Iterable[Tensor]) -> tuple[list[Tensor], dict[int, Place]]:
        """The blocks that have the tensors, to be sent, and the place of each, by its id."""
        blocks, places, others, size = [], {}, [], ALIGNED
        for tensor in tensors:
            block = next((one for one in self._blocks if one.data_ptr() == tensor.untyped_storage().data_ptr()), None)
            if block is None or not tensor.is_contiguous() or block[THERE]:
                places[id(tensor)] = Place(0, size, tensor.dtype, tensor.shape)
                others.append(tensor)
                size += -(-tensor.nbytes // ALIGNED) * ALIGNED
            else:
                block[THERE] = 1
                blocks.append(block)
                start = tensor.data_ptr() - block.data_ptr()
                places[id(tensor)] = Place(len(blocks), start, tensor.dtype, tensor.shape)
        copies = self._take(size, THERE)
        for tensor in others:
            _at(copies, places[id(tensor)]).copy_(tensor)
        return [copies, *blocks], places


def received(blocks: list[Tensor]) -> Callable[[Place], Tensor]:
    """What gives the tensors of sent blocks; a block goes back when its last one is gone."""
    wholes = [_leased(block, THERE) for block in blocks]
    return lambda place: _at(wholes[place.block], place)


def _shared(size: int) -> Tensor:
    with torch.inference_mode(False):
        block = torch.empty(0, dtype=torch.uint8, device="cpu").set_(torch.UntypedStorage._new_shared(size))
        block[:ALIGNED] = 0
    return block


def _leased(block: Tensor, who: int) -> Tensor:
    """The block as a tensor whose views keep it taken."""
    lease = block.numpy()
    weakref.finalize(lease, _release, block.numpy(), who, os.getpid()).atexit = False
    return torch.from_numpy(lease)


def _release(block: np.ndarray, who: int, process: int) -> None:
    # NumPy, because the last tensor may go amid a mode in which torch writes nothing
    if os.getpid() == process:  # a fork has the same objects
        block[who] = 0


def _bytes(place: Place) -> int:
    return place.shape.numel() * place.dtype.itemsize


def _at(block: Tensor, place: Place) -> Tensor:
    """A tensor in a block; no view of another, so that autograd counts the writes to each apart."""
    start = block.storage_offset() + place.start
    tensor = torch.empty(0, dtype=place.dtype, device="cpu")
    offset = start // place.dtype.itemsize
    return tensor.set_(block.untyped_storage(), offset, place.shape)  # pyright: ignore[reportCallIssue]


class _Joining(TorchFunctionMode):
    """Gives large results of ``torch.cat`` and ``torch.stack`` blocks of their own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.cat, torch.stack) and args and "out" not in kwargs and _worth_a_block(args[0]):
            shape = func([one.to("meta") for one in args[0]], *args[1:], **kwargs).shape
            kwargs = kwargs | {"out": BLOCKS.empty(shape, args[0][0].dtype)}
        return func(*args, **kwargs)


def _worth_a_block(tensors: Sequence[Tensor]) -> bool:
    """Pixels are large and of a floating type; what a processor joins before, as bytes, is not sent."""
    alike = all(one.is_cpu and one.dtype == tensors[0].dtype and not one.requires_grad for one in tensors)
    return alike and sum(one.nbytes for one in tensors if one.is_floating_point()) >= LARGE


BLOCKS = Blocks()
os.register_at_fork(after_in_child=BLOCKS.__init__)


def joining() -> Any:
    """In a data worker: large tensors that are joined inside are made where they can be sent from."""
    return nullcontext() if get_worker_info() is None else _Joining()
