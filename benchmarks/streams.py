"""How much two paired token streams cost beside the plain calls of the processors that they need.

512 rows of easy-VQA, each picture scaled to 448 px, in batches of 8, on one thread. All ratios are of one run, in which
the measured things take turns, and of the medians over the turns; processor time beside the clock's, for machines that
do other work:

- shared: PairedCollator with one encoding for both models, to a plain call of the processor on the same texts and
  pictures
- two processors: PairedCollator with two, to both plain calls one after the other, whose results are held together as
  a trainer would need them
- workers: a DataLoader over the same rows with one running worker, to the same with two; both take both processors,
  and this process does nothing but receive
- two processes: a loop in Python alone, in one process and shared between two: the most that these two cores can give

    python -m benchmarks.streams --data data/sample/vqa.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import tokenizers
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vlm_taid.data import Conversation, ConversationDataset, Part, SourceOptions, Turn
from vlm_taid.data.workers import DeafContext, keep_heap
from vlm_taid.streams import PairedCollator, SharedVocabulary, StreamEncoder
from vlm_taid.students import train_tokenizer

torch.set_num_threads(1)
keep_heap()  # as in training's workers, where streams are made; for all contenders
ROWS, SIDE, BATCH, TURNS = 512, 448, 8, 5


def real_rows(path: Path) -> list[Conversation]:
    """ROWS rows with their pictures scaled to SIDE pixels; a shorter file is repeated."""
    data = ConversationDataset([SourceOptions(str(path), "vqa")])
    rows = []
    for number in range(ROWS):
        row: Any = data[number % len(data)]
        turns = [Turn(turn.role, tuple(_scaled(part) for part in turn.parts)) for turn in row.turns]
        rows.append(Conversation(tuple(turns), row.row))
    return rows


def _scaled(part: Part) -> Part:
    return part if part.image is None else Part(image=part.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def processors(rows: list[Conversation]) -> tuple[Any, Any]:
    """LLaVA's at 448 px (784 image tokens and one) and Qwen2-VL's, over one tokenizer."""
    square = {"height": SIDE, "width": SIDE}
    tokenizer = train_tokenizer([turn.text for row in rows for turn in row.turns])
    llava = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=square, crop_size=square),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token="<image>",
    )
    other = train_tokenizer([turn.text for row in rows for turn in row.turns])
    other.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>"]})
    template = other.chat_template.replace("<image>", "<|image_pad|>")
    qwen = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(max_pixels=SIDE * SIDE),
        tokenizer=other,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return llava, qwen


def plain(processors: list[Any], batches: list[list[Conversation]]) -> Callable[[], None]:
    """The processors' own calls on rendered rows, a batch at a time: what any training would pay."""
    texts = [
        [
            processor.apply_chat_template(
                [row.messages() for row in batch], tokenize=False, chat_template=processor.chat_template
            )
            for processor in processors
        ]
        for batch in batches
    ]
    images = [[row.images for row in batch] for batch in batches]

    def run() -> None:
        for ours, pictures in zip(texts, images, strict=True):
            _ = [
                processor(
                    text=list(text), images=pictures, padding=True, padding_side="right", return_tensors="pt",
                    add_special_tokens=False,
                )
                for processor, text in zip(processors, ours, strict=True)
            ]  # fmt: skip

    return run


def collated(collator: PairedCollator, batches: list[list[Conversation]]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            collator(batch)

    return run


def loaded(collator: PairedCollator, rows: list[Conversation], workers: int) -> Callable[[], None]:
    """An epoch of a DataLoader whose workers run already: batches leave it as they do in training."""
    loader = DataLoader(
        rows,  # pyright: ignore[reportArgumentType]
        BATCH,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context=DeafContext(),
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


def python_loop(processes: int) -> Callable[[], None]:
    """Nothing but arithmetic in Python, divided among processes that share nothing."""

    def run() -> None:
        children = []
        for _ in range(processes):
            child = os.fork()
            if child == 0:
                value = 0
                for number in range(24_000_000 // processes):
                    value += number * number
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure paired streams.", allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="a file of questions: image, question, answer")
    rows = real_rows(parser.parse_args().data)
    batches = [rows[start : start + BATCH] for start in range(0, ROWS, BATCH)]
    mine, other = processors(rows)
    student, teacher = StreamEncoder(mine), StreamEncoder(other)
    shared = PairedCollator(student, student, SharedVocabulary(student, student))
    two = PairedCollator(student, teacher, SharedVocabulary(student, teacher))
    measured = {
        "plain": plain([mine], batches),
        "plain, both": plain([mine, other], batches),
        "shared": collated(shared, batches),
        "two": collated(two, batches),
        "1 worker": loaded(two, rows, 1),
        "2 workers": loaded(two, rows, 2),
        "1 process": python_loop(1),
        "2 processes": python_loop(2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in measured}
    processor_seconds: dict[str, list[float]] = {name: [] for name in measured}
    for function in measured.values():  # the libraries' caches, the workers' start
        function()
    for _ in range(TURNS):
        for name, function in measured.items():
            began, began_working = time.perf_counter(), time.process_time()
            function()
            seconds[name].append(time.perf_counter() - began)
            processor_seconds[name].append(time.process_time() - began_working)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    working = {name: statistics.median(values) for name, values in processor_seconds.items()}
    result = {
        **{
            f"{name}, {unit}": value
            for unit, m in (("wall", median), ("processor time", working))
            for name, value in (
                ("shared / plain", m["shared"] / m["plain"]),
                ("two / both plain", m["two"] / m["plain, both"]),
            )
        },
        "1 worker / 2 workers, wall": median["1 worker"] / median["2 workers"],
        "1 process / 2 processes, wall": median["1 process"] / median["2 processes"],
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "processor seconds": {  # the workers' are theirs
            name: [round(value, 2) for value in processor_seconds[name]] for name in list(measured)[:4]
        },
        "rows": ROWS, "picture": SIDE, "batch": BATCH, "turns": TURNS, "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
