"""A teacher on disk: for every paired position its K most probable shared tokens, and the mass of all others.

A cache is a folder of ``cache.json`` (what it was made of) and shards of rows, each a safetensors file that is written
beside and renamed. A row is found by its name, and is believed when the hash of the teacher's token ids, of the
positions and of the pictures is the one that it was stored with.

A token takes 8 bytes and 3 more for each of its K (3.25 when the vocabulary is over 65,536): the id, and a code of 8
bits, the log-probability's distance from the highest in equal steps. The listed probabilities are scaled back to one
minus the tail's mass, so that what is read sums to one.

Legend: N positions, R rows of a shard, K stored tokens, C shared vocabulary, B its buckets (C, and the rest).
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
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
from ..objectives import TopKSignal
from ..streams import TeacherRow

ABOUT = "cache.json"
VERSION = 1
STEPS = 255  # of a code
PARTS = ("low_NK", "high_NQ", "code_NK", "scale_N2")


@dataclass(frozen=True)
class StoredTokens:
    """K tokens of N positions as they are stored: ids in two parts, codes, and [step in nats, mass of the tail]."""

    low_NK: Any
    high_NQ: Any
    code_NK: Any
    scale_N2: Any

    @classmethod
    def of(cls, logits_NB: Tensor, k: int) -> StoredTokens:
        """Stores the distributions of logits.

        Args:
            logits_NB: fp32, over the shared vocabulary and, where there is one, its rest.
            k: tokens to keep, a multiple of 4 if B is over 65,536.
        """
        logp_NB = logits_NB.float().log_softmax(-1)
        logp_NK, ids_NK = logp_NB.topk(k, -1)
        # the sum of the others, not one minus the sum of the listed: a small tail keeps its digits
        others_NB = logp_NB.scatter(-1, ids_NK, -torch.inf)
        tail_N = others_NB.logsumexp(-1).exp() if k < logp_NB.shape[-1] else torch.zeros(len(logp_NB))
        below_NK = logp_NK[:, :1] - logp_NK
        step_N = (below_NK[:, -1] / STEPS).clamp_min(1e-9)
        code_NK = (below_NK / step_N[:, None]).round().to(torch.uint8)
        ids = ids_NK.cpu().numpy()
        high_NK = (ids >> 16).astype(np.uint8)
        packed = [high_NK[:, i::4] << (2 * i) for i in range(4)] if logp_NB.shape[-1] > 2**16 else []
        high_NQ = np.bitwise_or.reduce(packed) if packed else np.zeros((len(ids), 0), np.uint8)
        scale_N2 = torch.stack([step_N, tail_N.to(step_N.device)], -1).cpu().numpy().astype(np.float32)
        return cls((ids & 0xFFFF).astype(np.uint16), high_NQ, code_NK.cpu().numpy(), scale_N2)

    def signal(self) -> TopKSignal:
        """The stored distributions; each sums to one."""
        ids_NK = self.low_NK.astype(np.int64)
        for i in range(4 if self.high_NQ.shape[1] else 0):
            ids_NK[:, i::4] |= (self.high_NQ.astype(np.int64) >> (2 * i) & 3) << 16
        step_N1, tail_N = torch.from_numpy(self.scale_N2[:, :1].copy()), torch.from_numpy(self.scale_N2[:, 1].copy())
        below_NK = torch.from_numpy(self.code_NK.astype(np.float32)) * step_N1
        listed_N1 = torch.log1p(-tail_N.clamp(max=1 - 1e-6))[:, None]
        return TopKSignal(torch.from_numpy(ids_NK), torch.log_softmax(-below_NK, -1) + listed_N1, tail_N)

    @classmethod
    def joined(cls, tokens: Sequence[StoredTokens]) -> StoredTokens:
        parts: list[Any] = [np.concatenate([getattr(one, part) for one in tokens]) for part in PARTS]
        return cls(*parts)

    def rows(self, at: slice) -> StoredTokens:
        return StoredTokens(self.low_NK[at], self.high_NQ[at], self.code_NK[at], self.scale_N2[at])

    def checksum(self) -> int:
        return zlib.crc32(b"".join(np.ascontiguousarray(getattr(self, part)).tobytes() for part in PARTS))


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
    """Collects the rows of one shard and writes it whole, or not at all."""

    file: Path

    def __post_init__(self):
        self._rows: list[tuple[int, int, StoredTokens]] = []
        self._refused: list[int] = []

    def add(self, name: str, key: int, tokens: StoredTokens) -> None:
        self._rows.append((row_id(name), key, tokens))

    def refuse(self, name: str) -> None:
        """Notes a row that has no distributions, so that it is not missed."""
        self._refused.append(row_id(name))

    def write(self, k: int) -> None:
        tokens = [row[2] for row in self._rows]
        lengths = [len(token.code_NK) for token in tokens]
        tensors = {
            "row_id": np.array([row[0] for row in self._rows], np.int64),
            "row_key": np.array([row[1] for row in self._rows], np.int64),
            "row_checksum": np.array([token.checksum() for token in tokens], np.int64),
            "row_start": np.cumsum([0, *lengths], dtype=np.int64),
            "refused": np.array(self._refused, np.int64),
        }
        none = StoredTokens(
            np.zeros((0, k), np.uint16), np.zeros((0, 0), np.uint8), np.zeros((0, k), np.uint8), np.zeros((0, 2), "f4")
        )
        tensors |= vars(StoredTokens.joined(tokens) if tokens else none)
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

    Raises:
        InputError: there is no cache, it is not finished, a shard is broken, or it belongs to another recipe.
    """

    def __init__(self, folder: str | Path, belongs: Mapping[str, Any]):
        self.folder = Path(folder)
        try:
            about = json.loads((self.folder / ABOUT).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"teacher.cache: {folder} has no readable {ABOUT}: make it with vlm-taid cache") from error
        check_belongs(self.folder, about, belongs)
        self.head_rows: int = about["head_rows"]
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
        return {**self.__dict__, "_open": {}}

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
        if not tokens:
            return {"ids_NK": torch.zeros(0, 1).long(), "logp_NK": torch.zeros(0, 1), "tail_N": torch.zeros(0)}
        signal = StoredTokens.joined(tokens).signal()
        return {"ids_NK": signal.ids_NK, "logp_NK": signal.logp_NK, "tail_N": signal.tail_N}

    def share(self, *_: Any, **__: Any) -> None:
        """The cache was made over the shared vocabulary."""

    def prove_packing(self, *_: Any) -> None:
        """It runs no model."""

    def signal(self, batch: Mapping[str, Any]) -> TopKSignal:
        """The stored distributions at a PairedBatch's paired positions."""
        return TopKSignal(**batch["stored"])

    @contextmanager
    def gathered(self) -> Iterator[None]:
        yield


def check_belongs(folder: Path, about: Mapping[str, Any], belongs: Mapping[str, Any]) -> None:
    """Refuses a cache that was made of something else.

    Raises:
        InputError: naming each thing that differs, as it is in the cache and in the recipe.
    """
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
