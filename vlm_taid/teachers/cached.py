"""A teacher on disk: for every paired position its distribution over the shared tokens, as ``stored.py`` has it.

A cache is a folder of ``cache.json`` (what it was made of), ``basis.safetensors`` and shards of rows, each a
safetensors file that is written beside and renamed. A row is found by its name, and is believed when the hash of the
teacher's token ids, of the positions and of the pictures is the one that it was stored with.

Legend: N positions, K corrected buckets, R coefficients.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..errors import InputError
from ..objectives import Corrections, Head, HiddenSignal
from ..streams import TeacherRow
from .stored import PARTS, Basis, StoredTokens

ABOUT = "cache.json"
BASIS = "basis.safetensors"
VERSION = 2


def row_id(name: str) -> int:
    """A row's name as a number of 63 bits."""
    return _number(hashlib.blake2b(name.encode(), digest_size=8))


def row_key(row: TeacherRow) -> int:
    """What the teacher's distributions depend on, as a number: token ids, positions, pictures."""
    digest = hashlib.blake2b(row.ids_T.numpy().tobytes(), digest_size=8)
    digest.update(np.asarray(row.positions_N, np.int64).tobytes())
    for image in row.images:
        digest.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return _number(digest)


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little") >> 1


@dataclass
class ShardWriter:
    """Collects the rows of one shard and writes it whole, or not at all; ``nothing`` are no tokens."""

    file: Path
    nothing: StoredTokens

    def __post_init__(self):
        self._rows: list[tuple[int, int, StoredTokens]] = []
        self._refused: list[int] = []

    def add(self, name: str, key: int, tokens: StoredTokens) -> None:
        self._rows.append((row_id(name), key, tokens))

    def refuse(self, name: str) -> None:
        """Notes a row that has no distributions, so that it is not missed."""
        self._refused.append(row_id(name))

    def write(self) -> None:
        tokens = [row[2] for row in self._rows]
        tensors = {
            "row_id": np.array([row[0] for row in self._rows], np.int64),
            "row_key": np.array([row[1] for row in self._rows], np.int64),
            "row_checksum": np.array([token.checksum() for token in tokens], np.int64),
            "row_start": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            "refused": np.array(self._refused, np.int64),
            **vars(StoredTokens.joined([self.nothing, *tokens])),
        }
        beside = self.file.with_suffix(".partial")
        save_file(tensors, beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.rename(beside, self.file)


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:06}.safetensors"


class CachedTeacher:
    """Reads what ``vlm-taid cache`` wrote. Its ``stored`` runs in the DataLoader's workers, ``signal`` in the trainer.

    Args:
        folder: the cache.
        belongs: what the recipe at hand would make a cache of, as ``cache.json`` has it.
        device: where the losses are made.

    Raises:
        InputError: there is no cache, it is not finished, a shard is broken, or it belongs to another recipe.
    """

    def __init__(self, folder: str | Path, belongs: Mapping[str, Any], device: torch.device):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / ABOUT).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"teacher.cache: {folder} has no readable {ABOUT}: make it with vlm-taid cache") from error
        check_belongs(self.folder, about, belongs)
        self.head_rows: int = about["head_rows"]
        self.basis = Basis.load(self.folder / BASIS, about.get("basis")).to(device)
        self.head: Head = self.basis.head(False)
        self.nothing = self.basis.nothing(about["k"])
        self.files = [shard_file(self.folder, number) for number in range(about["shards"])]
        self._open: dict[int, Any] = {}
        ids, shards, places = [], [], []
        for number in range(len(self.files)):
            shard = self._shard(number)
            found = [shard.get_tensor("row_id"), shard.get_tensor("refused")]
            ids += found
            shards.append(np.full(sum(map(len, found)), number, np.int32))
            places.append(np.concatenate([np.arange(len(found[0])), np.full(len(found[1]), -1)]))
        self._open = {}  # a worker opens its own
        every = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        order = np.argsort(every, kind="stable")
        self._ids, self._shards, self._places = every[order], *(np.concatenate(x)[order] for x in (shards, places))

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            file = self.files[number]
            try:
                self._open[number] = safe_open(file, framework="numpy")
            except FileNotFoundError as error:
                raise InputError(f"{file} is missing: run vlm-taid cache again, it goes on where it stopped") from error
            except (OSError, SafetensorError) as error:
                raise InputError(f"{file} is broken ({error}): remove it and run vlm-taid cache again") from error
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "basis": None, "head": None}  # of no use to a worker

    def check_rows(self, names: Iterable[str]) -> None:
        """Refuses data of which the cache lacks rows.

        Raises:
            InputError: the first of them is named.
        """
        known = set(self._ids.tolist())
        missing = [name for name in names if row_id(name) not in known]
        if missing:
            raise InputError(
                f"the cache {self.folder} lacks {len(missing)} rows of this recipe's data, the first is {missing[0]}: "
                "run vlm-taid cache with this recipe"
            )

    def row(self, name: str, key: int) -> StoredTokens:
        """One row's tokens.

        Raises:
            InputError: the row is not there, was stored for other tokens or pictures, or its bytes are damaged.
        """
        wanted = row_id(name)
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted or self._places[at] < 0:
            raise InputError(f"{name} is not in {self.folder}: run vlm-taid cache with this recipe's data")
        number, place = int(self._shards[at]), int(self._places[at])
        shard = self._shard(number)
        if int(shard.get_slice("row_key")[place : place + 1][0]) != key:
            raise InputError(
                f"{name} was stored in {self.folder} for other token ids, positions or pictures than it has now: the "
                "data has changed, make the cache again"
            )
        start, stop = shard.get_slice("row_start")[place : place + 2].tolist()
        tokens = StoredTokens(*(shard.get_slice(part)[start:stop] for part in PARTS))
        if tokens.checksum() != int(shard.get_slice("row_checksum")[place : place + 1][0]):
            raise InputError(f"{name}: its bytes in {self.files[number]} are damaged: remove the file and cache again")
        return tokens

    def stored(self, rows: Sequence[TeacherRow]) -> dict[str, Tensor]:
        """A batch's entries: the signals of its rows, one after the other."""
        tokens = [self.row(row.name, row_key(row)) for row in rows]
        return StoredTokens.joined([self.nothing, *tokens]).read()

    def share(self, columns: Tensor | slice, rest: Tensor | None = None) -> None:
        """The cache was made over the shared vocabulary; what it has to know is whether there is a rest."""
        self.head = self.basis.head(rest is not None and len(rest) > 0)

    def prove_packing(self, *_: Any) -> None:
        """It runs no model."""

    def signal(self, batch: Mapping[str, Any]) -> HiddenSignal:
        """The stored distributions at a PairedBatch's paired positions."""
        stored = batch["stored"]
        return HiddenSignal(stored["coefficients_NR"], self.head, Corrections(stored["ids_NK"], stored["added_NK"]))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield


def check_belongs(folder: Path, about: Mapping[str, Any], belongs: Mapping[str, Any]) -> None:
    """Refuses a cache that was made of something else.

    Raises:
        InputError: naming each thing that differs, as it is in the cache and in the recipe.
    """
    if about.get("version") != VERSION:
        raise InputError(
            f"the cache {folder} is of format {about.get('version')}, and {VERSION} is read here: make it again with "
            "vlm-taid cache and another --output"
        )
    differing = [
        f"{key} ({about.get(key)!r} there, {value!r} here)" for key, value in belongs.items() if about.get(key) != value
    ]
    if differing:
        raise InputError(
            f"the cache {folder} does not belong to this recipe; what differs: {'; '.join(differing)}: give the recipe "
            "that it was made with, or make another cache"
        )


def fingerprint(path: str | Path) -> str:
    """A model folder's weights as a short hash: names and sizes of the files, and of each its first and last MiB.

    Raises:
        InputError: the folder has no safetensors weights.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no weights: *.safetensors was expected beside config.json")
    digest = hashlib.blake2b(digest_size=12)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read(2**20))
    return digest.hexdigest()
