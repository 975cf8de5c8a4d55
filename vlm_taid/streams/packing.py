"""Packing: short rows one behind the other in a sequence, with no attention and no position across them.

A packed batch has ``position_ids`` that begin at 0 with each row, and no attention mask: transformers then makes the
block mask of its attention from them. What is left of a sequence is one more such row, of padding.

Legend: R rows, T positions of the longest row, P packs, L positions of the longest pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch


def best_fit(sizes_R: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows put together so that few sequences are needed: the longest first, each where the least room is left.

    Args:
        sizes_R: tokens of each row; a row of more than ``capacity`` gets a pack of its own.
        capacity: tokens of a pack.

    Returns:
        The packs: rows in rising order, packs by their first rows.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), rising
    for row in sorted(range(len(sizes_R)), key=lambda row: (-sizes_R[row], row)):
        size = sizes_R[row]
        place = bisect_left(rooms, (size, -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
            packs[pack].append(row)
        else:
            room, pack = capacity, len(packs)
            packs.append([row])
        insort(rooms, (room - size, pack))
    return sorted((sorted(pack) for pack in packs), key=lambda pack: pack[0])


def packed(
    inputs: dict[str, Any], lengths_R: Sequence[int], packs: Sequence[Sequence[int]], pad: int
) -> tuple[dict[str, Any], list[int]]:
    """A padded batch's inputs laid out as packs.

    Args:
        inputs: ``input_ids`` [R, T] padded on the right, other tensors of that shape, ``attention_mask``, and what
            belongs to pictures in the order of the rows, which stays as it is.
        lengths_R: tokens of each row.
        packs: the rows of each pack; all rows, in order.
        pad: the id of padding.

    Returns:
        The inputs, ``input_ids`` [P, L] and the like, with ``position_ids`` [P, L] and without ``attention_mask``;
        and of each row the place of its first token in [P * L].
    """
    shape = inputs["input_ids"].shape
    width = max(max((sum(lengths_R[row] for row in pack) for pack in packs), default=1), 1)
    starts_R = [0] * len(lengths_R)
    positions_PL = torch.arange(width).repeat(len(packs), 1)
    for number, pack in enumerate(packs):
        at = 0
        for row in pack:
            starts_R[row] = number * width + at
            positions_PL[number, at:] -= int(positions_PL[number, at])
            at += lengths_R[row]
        if at < width:
            positions_PL[number, at:] = torch.arange(width - at)
    made: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == "attention_mask":
            continue
        if isinstance(value, torch.Tensor) and value.shape == shape:
            laid = value.new_full((len(packs) * width,), pad if key == "input_ids" else 0)
            for row, start in enumerate(starts_R):
                laid[start : start + lengths_R[row]] = value[row, : lengths_R[row]]
            value = laid.view(len(packs), width)
        made[key] = value
    return {**made, "position_ids": positions_PL}, starts_R
