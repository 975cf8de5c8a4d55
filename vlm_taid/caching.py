"""cache: the teacher's distributions at every answer token, once, to disk.

A shard holds the rows of a fixed stretch of the data, so a run that was stopped goes on with the first shard that is
missing, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

from .data import Conversation, ConversationDataset
from .errors import BadRow, InputError
from .objectives.signals import teacher_logits
from .pairing import paired_collator
from .recipe import Recipe
from .streams import PairedCollator, SharedVocabulary, StreamEncoder, TeacherRow
from .teachers import ABOUT, VERSION, LiveTeacher, ShardWriter, StoredTokens, fingerprint, row_key, shard_file

CHUNK_BYTES = 2**28  # logits of a chunk of positions, fp32


def cache(recipe: Recipe, output: Path, k: int = 64, rows_per_shard: int = 4096) -> Path:
    """Writes the teacher's top-k distributions of a recipe's training and validation rows.

    Args:
        recipe: whose teacher, student (its tokenizer) and data count; of ``training`` the batch size, the data
            workers, the seed and, for a sharded teacher, ``deepspeed``.
        output: the cache's folder. One that holds a part of this very cache is completed.
        k: tokens to keep at each position, a multiple of 4.
        rows_per_shard: rows of a file.

    Returns:
        The folder, for ``teacher.cache`` of the recipe.

    Raises:
        InputError: the recipe has no teacher, the folder holds another cache, or a row is bad and is not to be skipped.
    """
    if recipe.teacher is None:
        raise InputError("the recipe has no teacher section: there is nothing to cache")
    if k < 4 or k % 4:
        raise InputError(f"k is {k}: a multiple of 4 is expected")
    if recipe.data.streaming:
        raise InputError("a cache is of rows that have places: set data.streaming: false")
    arguments = _reduced(recipe).arguments()
    state = PartialState()
    teacher = LiveTeacher(recipe.teacher, arguments.device)
    collator = paired_collator(recipe)
    if collator.teacher is None or collator.vocabulary is None:
        raise InputError(f"objective.name is {recipe.objective.name}, which has no use for a teacher to cache")
    rest_R = collator.vocabulary.teacher_rest_R
    teacher.share(
        collator.vocabulary.teacher_columns_C.to(arguments.device),
        None if rest_R is None else rest_R.to(arguments.device),
    )
    names, datasets = _rows(recipe, arguments.seed)
    stretches = [
        range(start, min(start + rows_per_shard, len(names))) for start in range(0, len(names), rows_per_shard)
    ]
    about = belongs(recipe, collator.teacher, collator.vocabulary)
    about |= {"k": min(k, len(collator.vocabulary)), "rows_per_shard": rows_per_shard, "shards": len(stretches)}
    about["head_rows"] = teacher.head_rows
    about["names"] = hashlib.blake2b("\n".join(names).encode(), digest_size=12).hexdigest()
    if state.is_main_process:
        _begin(output, about)
    state.wait_for_everyone()
    todo = [number for number in range(len(stretches)) if not shard_file(output, number).exists()]
    todo = _agreed(todo)[state.process_index :: state.num_processes]
    size = arguments.per_device_train_batch_size
    batches = [(number, rows) for number in todo for rows in _batched(stretches[number], size)]
    most = max(gather_object([len(batches)]))
    padded = [list(rows) for _, rows in batches] + [[]] * (most - len(batches))  # a sharded teacher runs in lockstep
    loader = DataLoader(
        _Rows(names, datasets), batch_sampler=padded, collate_fn=_Collate(collator),
        num_workers=arguments.dataloader_num_workers,
    )  # fmt: skip
    writer: ShardWriter | None = None
    for i, (batch, rows) in enumerate(loader):
        with teacher.gathered():
            tokens = _stored(teacher, batch.to(arguments.device), about["k"])
        if i >= len(batches):
            continue
        number = batches[i][0]
        writer = writer or ShardWriter(shard_file(output, number))
        start = 0
        for name, key, length in rows:
            if length is None:
                writer.refuse(name)
                continue
            writer.add(name, key, tokens.rows(slice(start, start + length)))
            start += length
        if i + 1 == len(batches) or batches[i + 1][0] != number:
            writer.write(about["k"])
            writer = None
            print(f"shard {number + 1} of {len(stretches)} is written", flush=True)
    state.wait_for_everyone()
    return output


def belongs(recipe: Recipe, theirs: StreamEncoder, vocabulary: SharedVocabulary) -> dict[str, Any]:
    """What a cache of this recipe depends on; what ``CachedTeacher`` compares."""
    teacher = recipe.teacher
    assert teacher is not None
    config = AutoConfig.from_pretrained(teacher.path, trust_remote_code=teacher.trust_remote_code).to_diff_dict()
    for key in ("_name_or_path", "transformers_version", "dtype"):
        config.pop(key, None)
    settings = theirs.processor.to_dict() if theirs.takes_images else {}
    shared = [vocabulary.student_columns_C, vocabulary.teacher_columns_C]
    shared += [rest_R for rest_R in (vocabulary.student_rest_R, vocabulary.teacher_rest_R) if rest_R is not None]
    found: dict[str, Any] = {
        "version": VERSION,
        "teacher.config": _hash(json.dumps(config, sort_keys=True, default=str)),
        "teacher.dtype": teacher.dtype,
        "teacher.tokenizer": _hash(theirs.tokenizer.backend_tokenizer.to_str()),
        "teacher.chat_template": _hash(str(theirs.renderer.template)),
        "teacher.system": _hash(str(theirs.renderer.system)),
        "teacher.processor": _hash(repr(sorted(settings.items(), key=lambda item: item[0]))),
        "shared vocabulary": _hash(torch.cat(shared).numpy().tobytes()),
    }
    if Path(teacher.path).is_dir():  # training needs the teacher's config and tokenizer alone
        if any(Path(teacher.path).glob("*.safetensors")):
            found["teacher.weights"] = fingerprint(teacher.path)
    else:
        found["teacher.path"] = teacher.path
    return found


def _hash(data: str | bytes) -> str:
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=12).hexdigest()


def _reduced(recipe: Recipe) -> Recipe:
    """The recipe with what caching needs of ``training``: DeepSpeed is for a sharded teacher alone."""
    assert recipe.teacher is not None
    kept = ["per_device_train_batch_size", "dataloader_num_workers", "seed", "output_dir", "use_cpu", "bf16"]
    kept += ["deepspeed"] if recipe.teacher.zero_stage == 3 else []
    training = {key: value for key, value in recipe.training.items() if key in kept}
    return dataclasses.replace(recipe, training=training)


def _begin(output: Path, about: dict[str, Any]) -> None:
    """Makes the folder, or checks that it holds a part of this cache."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / ABOUT
    if file.is_file():
        before = json.loads(file.read_text())
        differing = sorted(key for key in {**before, **about} if before.get(key) != about.get(key))
        if differing:
            raise InputError(
                f"{output} holds another cache, which differs in {', '.join(differing)}: give another --output, or "
                "remove it"
            )
        for partial in output.glob("*.partial"):
            partial.unlink()
        return
    if any(output.iterdir()):
        raise InputError(f"{output} is not empty and holds no cache: give another --output")
    beside = output / f"{ABOUT}.partial"
    beside.write_text(json.dumps(about, indent=1))
    os.rename(beside, file)


def _agreed(numbers: list[int]) -> list[int]:
    """Rank 0's list on every rank: another may have looked at another moment."""
    box: list[Any] = [numbers]
    broadcast_object_list(box)
    return box[0]


def _rows(recipe: Recipe, seed: int) -> tuple[list[str], list[tuple[ConversationDataset, int]]]:
    """Every row once, by name, with the place that it is read from."""
    found: dict[str, tuple[ConversationDataset, int]] = {}
    for sources in (recipe.data.train, recipe.data.validation):
        if sources:
            dataset = ConversationDataset(
                sources, on_bad_row=recipe.data.on_bad_row, allow_urls=recipe.data.allow_urls, seed=seed
            )
            for index, name in enumerate(dataset.row_names()):
                found.setdefault(name, (dataset, index))
    return list(found), list(found.values())


def _batched(rows: range, size: int) -> Iterator[range]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


class _Rows(Dataset):
    """Rows with their names, because a refused row must be known too."""

    def __init__(self, names: Sequence[str], places: Sequence[tuple[ConversationDataset, int]]):
        self.names, self.places = names, places

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Conversation | BadRow]:
        dataset, place = self.places[index]
        return self.names[index], dataset[place]


class _Collate:
    """A PairedBatch, and (name, key, positions) of each row; None, None for a refused one."""

    def __init__(self, collator: PairedCollator):
        self.collator = collator
        self.keys: dict[str, tuple[int, int]] = {}
        collator.stored = self._note

    def _note(self, rows: Sequence[TeacherRow]) -> dict[str, Tensor]:
        self.keys = {row.name: (row_key(row), len(row.positions_N)) for row in rows}
        return {}

    def __call__(self, rows: Sequence[tuple[str, Conversation | BadRow]]) -> tuple[Any, list[tuple]]:
        batch = self.collator([row for _, row in rows])
        return batch, [(name, *self.keys.get(name, (None, None))) for name, _ in rows]


def _stored(teacher: LiveTeacher, batch: Any, k: int) -> StoredTokens:
    signal = teacher.signal(batch)
    chunk = max(1, CHUNK_BYTES // (4 * signal.head.width))
    ranges = [slice(start, start + chunk) for start in range(0, max(len(signal.hidden_NG), 1), chunk)]
    parts = [StoredTokens.of(teacher_logits(signal, at), k) for at in ranges]
    return StoredTokens.joined(parts)
