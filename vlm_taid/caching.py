"""cache: the teacher's distributions at every answer token, once, to disk.

First a basis of its logits is fitted to positions from all over the data, and written. A shard holds the rows of a
fixed stretch of the data, so a run that was stopped goes on with the first shard that is missing, on any number of
ranks.
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
from .objectives import HiddenSignal, as_slice
from .objectives.signals import teacher_logits
from .pairing import paired_collator
from .recipe import Recipe
from .streams import PairedCollator, SharedVocabulary, StreamEncoder, TeacherRow
from .teachers import (
    ABOUT,
    BASIS,
    EIGHTS,
    FOURS,
    VERSION,
    Basis,
    K,
    LiveTeacher,
    ShardWriter,
    StoredTokens,
    file_hash,
    fingerprint,
    row_key,
    shard_file,
)

CHUNK_BYTES = 2**28  # logits of a chunk of positions, fp32
FIT_ROWS, FIT_POSITIONS = 256, 2048  # that a basis is fitted to


def cache(
    recipe: Recipe,
    output: Path,
    k: int = K,
    rows_per_shard: int = 4096,
    coefficients: tuple[int, int] = (EIGHTS, FOURS),
) -> Path:
    """Writes the teacher's distributions at the answer tokens of a recipe's training and validation rows.

    Args:
        recipe: whose teacher, student (its tokenizer) and data count; of ``training`` the batch size, the data
            workers, the seed and, for a sharded teacher, ``deepspeed``.
        output: the cache's folder. One that holds a part of this very cache is completed.
        k: tokens to correct at each position, a multiple of 4.
        rows_per_shard: rows of a file.
        coefficients: how many of 8 and of 4 bits.

    Returns:
        The folder, for ``teacher.cache`` of the recipe.

    Raises:
        InputError: the recipe has no teacher, the folder holds another cache, or a row is bad and is not to be skipped.
    """
    if recipe.teacher is None:
        raise InputError("the recipe has no teacher section: there is nothing to cache")
    if k < 4 or k % 4:
        raise InputError(f"k is {k}: a multiple of 4 is expected")
    if min(coefficients) < 0 or coefficients[0] < 2 or any(count % 2 for count in coefficients):
        raise InputError(
            f"coefficients are {coefficients[0]} and {coefficients[1]}: two even numbers are expected, the first at "
            "least 2"
        )
    if rows_per_shard < 1:
        raise InputError(f"rows_per_shard is {rows_per_shard}: at least 1 is needed")
    if recipe.data.streaming:
        raise InputError("a cache is of rows that have places: set data.streaming: false")
    arguments = _reduced(recipe).arguments()
    state = PartialState()
    teacher = LiveTeacher(recipe.teacher, arguments.device)
    collator = paired_collator(recipe)
    if collator.teacher is None or collator.vocabulary is None:
        raise InputError(f"objective.name is {recipe.objective.name}, which has no use for a teacher to cache")
    vocabulary, device = collator.vocabulary, arguments.device
    rest_R = None if vocabulary.teacher_rest_R is None else vocabulary.teacher_rest_R.to(device)
    teacher.share(as_slice(vocabulary.teacher_columns_C.to(device)), rest_R)
    names, datasets = _rows(recipe, arguments.seed)
    stretches = [
        range(start, min(start + rows_per_shard, len(names))) for start in range(0, len(names), rows_per_shard)
    ]
    about = belongs(recipe, collator.teacher, vocabulary)
    about |= {"k": min(k, len(vocabulary)), "rows_per_shard": rows_per_shard, "shards": len(stretches)}
    about["coefficients"] = list(coefficients)
    about["head_rows"] = teacher.head_rows
    about["names"] = hashlib.blake2b("\n".join(names).encode(), digest_size=12).hexdigest()
    size = arguments.per_device_train_batch_size
    found = [_begun(output, about) if state.is_main_process else False]
    broadcast_object_list(found)
    if not found[0]:  # every rank runs the same rows, for a sharded teacher
        step = -(-len(names) // FIT_ROWS)
        batches = _batched(range(0, len(names), step), size)
        loader = _loader(names, datasets, [list(rows) for rows in batches], collator, arguments)
        typical_PB = _typical(teacher, loader, device)
        if state.is_main_process:
            Basis.of(typical_PB, *coefficients).save(output / BASIS)
            _begin(output, about | {"basis": file_hash(output / BASIS)})
        del typical_PB
    state.wait_for_everyone()
    basis = Basis.load(output / BASIS, json.loads((output / ABOUT).read_text())["basis"]).to(device)
    nothing = basis.nothing(about["k"])
    todo = [number for number in range(len(stretches)) if not shard_file(output, number).exists()]
    todo = _agreed(todo)[state.process_index :: state.num_processes]
    batches = [(number, rows) for number in todo for rows in _batched(stretches[number], size)]
    most = max(gather_object([len(batches)]))
    padded = [list(rows) for _, rows in batches] + [[]] * (most - len(batches))  # a sharded teacher runs in lockstep
    loader = _loader(names, datasets, padded, collator, arguments)
    writer: ShardWriter | None = None
    for i, (batch, rows) in enumerate(loader):
        with teacher.gathered():
            signal = teacher.signal(batch.to(device))
            parts = [StoredTokens.of(teacher_logits(signal, at), basis, about["k"]) for at in _chunks(signal)]
            tokens = StoredTokens.joined([nothing, *parts])
        if i >= len(batches):
            continue
        number = batches[i][0]
        writer = writer or ShardWriter(shard_file(output, number), nothing)
        start = 0
        for name, key, length in rows:
            if length is None:
                writer.refuse(name)
                continue
            writer.add(name, key, tokens.rows(slice(start, start + length)))
            start += length
        if i + 1 == len(batches) or batches[i + 1][0] != number:
            writer.write()
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


def _begun(output: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds a part of this cache; it is made if there is none."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / ABOUT
    if file.is_file():
        before = json.loads(file.read_text())
        differing = sorted(key for key in {**before, **about} if key != "basis" and before.get(key) != about.get(key))
        if differing:
            raise InputError(
                f"{output} holds another cache, which differs in {', '.join(differing)}: give another --output, or "
                "remove it"
            )
        for partial in output.glob("*.partial"):
            partial.unlink()
        return True
    unfinished = {BASIS, f"{Path(BASIS).stem}.partial", f"{ABOUT}.partial"}  # of a run that was stopped before it began
    if any(path.name not in unfinished for path in output.iterdir()):
        raise InputError(f"{output} is not empty and holds no cache: give another --output")
    return False


def _begin(output: Path, about: dict[str, Any]) -> None:
    beside = output / f"{ABOUT}.partial"
    beside.write_text(json.dumps(about, indent=1))
    os.rename(beside, output / ABOUT)


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


def _loader(
    names: Any, datasets: Any, batches: list[list[int]], collator: PairedCollator, arguments: Any
) -> DataLoader:
    return DataLoader(
        _Rows(names, datasets), batch_sampler=batches, collate_fn=_Collate(collator),
        num_workers=arguments.dataloader_num_workers,
    )  # fmt: skip


def _chunks(signal: HiddenSignal) -> list[slice]:
    chunk = max(1, CHUNK_BYTES // (4 * signal.head.width))
    return [slice(start, start + chunk) for start in range(0, len(signal.hidden_NG), chunk)]


def _typical(teacher: LiveTeacher, loader: DataLoader, device: torch.device) -> Tensor:
    """Logits [P, B] at evenly spaced positions of some batches."""
    most = -(-2 * FIT_POSITIONS // len(loader))
    hidden_PG = torch.cat([_spaced(teacher.signal(batch.to(device)).hidden_NG, most) for batch, _ in loader])
    signal = HiddenSignal(_spaced(hidden_PG, FIT_POSITIONS), teacher.head)
    if not len(hidden_PG):
        raise InputError("no row of the data has an answer token that pairs: there is nothing to cache")
    with teacher.gathered():
        return torch.cat([teacher_logits(signal, at) for at in _chunks(signal)])


def _spaced(hidden_NG: Tensor, most: int) -> Tensor:
    """At most so many positions, evenly spaced."""
    N = len(hidden_NG)
    return hidden_NG[torch.linspace(0, N - 1, most).long().to(hidden_NG.device)] if most < N else hidden_NG
