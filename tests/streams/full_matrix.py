"""The matrix of pairs over whole sources instead of samples: not a test, because it takes hours.

    python data/easy_vqa.py --output runs/easy_vqa
    python data/emoji_scenes.py --output runs/emoji
    python -m tests.streams.full_matrix --questions runs/easy_vqa/train.jsonl runs/emoji/train.jsonl [--every 20]

Of text: WordNet's sample, and Wikipedia's leads where ``data/smollm2.py`` has fetched them. A line a pair; the first
row that fails stops it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.streams.rows import fetched_leads, odd_rows, picture_rows, sample
from tests.streams.test_matrix import PAIRS, Room


def main() -> None:
    parser = argparse.ArgumentParser(description="Check all pairs on whole sources.", allow_abbrev=False)
    parser.add_argument("--questions", type=Path, nargs="+", required=True, help="files with image, question, answer")
    parser.add_argument("--every", type=int, default=1, help="take every n-th row (default: 1, all)")
    given = parser.parse_args()
    _, texts = sample()
    texts = (texts + fetched_leads())[:: given.every] + odd_rows()
    extra = [turn.text for row in texts for turn in row.turns if turn.role == "assistant"]
    rows = paired = 0
    for pair in PAIRS:
        here, began, before = Room(pair), time.perf_counter(), (rows, paired)
        pictures = (row for file in given.questions for row in picture_rows(file, extra, given.every))
        for source in (pictures if here.collate.student.takes_images else (), texts):
            block = []
            for row in source:
                block.append(row)
                if len(block) == 240:  # pictures are opened as they are needed
                    taken = here.taken(block)
                    rows, paired, block = rows + len(taken), paired + here.check(taken), []
            taken = here.taken(block)
            rows, paired = rows + len(taken), paired + here.check(taken)
        seconds = time.perf_counter() - began
        print(f"{pair}: {rows - before[0]} rows, {paired - before[1]} positions, {seconds:.0f} s", flush=True)
    print(f"{len(PAIRS)} pairs, {rows} rows, {paired} paired positions: all as the oracle has them")


if __name__ == "__main__":
    main()
