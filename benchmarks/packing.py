"""What it costs to measure rows for packing: by their pictures' sizes, as it is done, and by the processor.

512 rows of easy-VQA, each picture scaled to one of SIZES sizes of at most 448 px, as a data worker packs a stream:
4,096 tokens a pack, one pack a batch, one thread, two processors (LLaVA's and Qwen2-VL's), the measured things in turn.

    python -m benchmarks.packing --data data/sample/vqa.jsonl --sizes 128
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from benchmarks.streams import SIDE, processors, real_rows
from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.streamed_batches import StreamedBatches
from vlm_taid.streams import PairedCollator, SharedVocabulary, StreamEncoder

CAPACITY, TURNS = 4096, 3


def of_sizes(rows: list[Conversation], sizes: int) -> list[Conversation]:
    """The rows with their pictures in so many sizes."""
    made = []
    for number, row in enumerate(rows):
        size = (SIDE - number * 37 % sizes, SIDE - number * 53 % sizes)
        turns = [Turn(turn.role, tuple(_scaled(part, size) for part in turn.parts)) for turn in row.turns]
        made.append(Conversation(tuple(turns), row.row))
    return made


def _scaled(part: Part, size: tuple[int, int]) -> Part:
    return part if part.image is None else Part(image=part.image.resize(size, Image.Resampling.BICUBIC))


def packed(rows: list[Conversation], collator: PairedCollator) -> float:
    """Seconds until all rows have come out in packs."""
    source: Any = SimpleNamespace(read=lambda *place: ((row, [0]) for row in rows * 3))
    began, seen = time.perf_counter(), 0
    for batch in StreamedBatches(source, collator, 1, capacity=CAPACITY):
        seen += len(batch["rows"])
        if seen >= len(rows):
            break
    return time.perf_counter() - began


def by_the_processor(collator: PairedCollator) -> Callable[[Conversation], int]:
    encoders = [collator.student, collator.teacher]
    return lambda row: max(len(encoder.encode(row).input_ids_T) for encoder in encoders if encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="easy-VQA's rows")
    parser.add_argument("--sizes", type=int, default=128, help="how many sizes the pictures have")
    options = parser.parse_args()
    rows = of_sizes(real_rows(options.data), options.sizes)
    mine, other = processors(rows)
    seconds: dict[str, list[float]] = {"by sizes": [], "by the processor": []}
    for turn in range(TURNS):
        for name in seconds:
            student, teacher = StreamEncoder(mine), StreamEncoder(other)  # anew: no size was seen yet
            collator = PairedCollator(student, teacher, SharedVocabulary(student, teacher))
            if name == "by the processor":
                collator.tokens = by_the_processor(collator)  # pyright: ignore[reportAttributeAccessIssue]
            seconds[name].append(packed(rows, collator))
        print(turn + 1, {name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    ours, theirs = (statistics.median(values) for values in seconds.values())
    print(f"{len(rows)} rows, {options.sizes} sizes: {ours:.2f} s by sizes, {theirs:.2f} s: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
