"""What the rows' lengths are measured for: packs, and batches of rows of similar length.

Legend: R rows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import TrainingArguments

from .data import ConversationDataset
from .streams import Pack, PairedCollator, best_fit, serialised

WINDOW = 1024  # rows that are packed together: enough to leave little room, and packs of rows of all lengths


def row_lengths(dataset: ConversationDataset, collator: PairedCollator, arguments: TrainingArguments) -> list[int]:
    """Tokens of every row in the longer of its streams, 0 for a refused one.

    Measured once, a part on each rank by its data workers, and kept in the run's folder; every rank must call.
    """
    file = Path(str(arguments.output_dir)) / f"lengths-{_key(dataset, collator)}.npy"
    kept: list = [np.load(file).tolist() if arguments.process_index == 0 and file.is_file() else None]
    broadcast_object_list(kept)
    if kept[0] is not None:
        return kept[0]
    world, rank = arguments.world_size, arguments.process_index
    mine = range(rank, len(dataset), world)
    loader = DataLoader(
        torch.utils.data.Subset(dataset, mine), batch_size=16, num_workers=arguments.dataloader_num_workers,
        collate_fn=_Tokens(collator), generator=torch.Generator(),
    )  # fmt: skip
    shown = tqdm(loader, desc="measuring rows", disable=arguments.disable_tqdm or rank > 0)
    parts = gather_object([[length for lengths in shown for length in lengths]])
    lengths_R = np.zeros(len(dataset), dtype=np.int64)
    for number, part in enumerate(parts):
        lengths_R[number::world] = part
    if rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".partial.npy")
        np.save(beside, lengths_R)
        beside.rename(file)
    return lengths_R.tolist()


def _key(dataset: ConversationDataset, collator: PairedCollator) -> str:
    encoders = [collator.student] if collator.teacher is None else [collator.student, collator.teacher]
    what = (dataset.fingerprint(), collator.options.max_length, collator.options.answers, *map(serialised, encoders))
    return hashlib.blake2b(repr(what).encode(), digest_size=8).hexdigest()


class _Tokens:
    def __init__(self, collator: PairedCollator):
        self.collator = collator

    def __call__(self, rows: Sequence) -> list[int]:
        return [self.collator.tokens(row) for row in rows]


class PackedRows(Dataset):
    """A dataset's rows in packs; which rows share a pack is decided once, by the seed.

    Args:
        dataset: the rows.
        lengths_R: their tokens.
        capacity: tokens of a pack.
        seed: of the order in which rows are packed; None: their own.
    """

    def __init__(self, dataset: ConversationDataset, lengths_R: Sequence[int], capacity: int, seed: int | None):
        self.dataset = dataset
        order_R = list(range(len(dataset)))
        if seed is not None:
            random.Random(seed).shuffle(order_R)
        self.packs: list[list[int]] = []
        for start in range(0, len(order_R), WINDOW):
            rows = order_R[start : start + WINDOW]
            for pack in best_fit([lengths_R[row] for row in rows], capacity):
                self.packs.append([rows[place] for place in pack])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Pack:
        return [self.dataset[row] for row in self.packs[index]]


class LengthGrouped(Sampler[int]):
    """Rows in blocks of similar length, one block for a micro-batch on all ranks; the blocks come at random.

    The order is a function of the seed and ``epoch``, which the trainer sets, alone: a resumed run goes on in it.

    Args:
        lengths_R: tokens of the rows.
        block: rows of a micro-batch over all ranks.
        seed: of the order.
    """

    def __init__(self, lengths_R: Sequence[int], block: int, seed: int):
        self.lengths_R, self.block, self.seed, self.epoch = lengths_R, block, seed, 0

    def __len__(self) -> int:
        return len(self.lengths_R)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order_R = list(range(len(self.lengths_R)))
        draw.shuffle(order_R)
        whole = len(order_R) - len(order_R) % self.block
        blocks = []
        for start in range(0, whole, 50 * self.block):  # sorted in stretches, so that blocks differ between epochs
            rows = sorted(order_R[start : min(start + 50 * self.block, whole)], key=lambda row: -self.lengths_R[row])
            blocks += [rows[at : at + self.block] for at in range(0, len(rows), self.block)]
        draw.shuffle(blocks)
        if blocks:  # the longest first: what does not fit into memory fails at once
            longest = max(range(len(blocks)), key=lambda number: self.lengths_R[blocks[number][0]])
            blocks[0], blocks[longest] = blocks[longest], blocks[0]
        yield from (row for rows in blocks for row in rows)
        yield from order_R[whole:]
