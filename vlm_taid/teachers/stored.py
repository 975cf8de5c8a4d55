"""A teacher's distributions in few bytes: a low-rank approximation of all logits, corrected at the likeliest tokens.

A language model's log-probabilities lie near a space of far fewer dimensions than its vocabulary. ``Basis`` is that
space, fitted once for each cache. A position is R coefficients in it, and the corrections that make its K most probable
tokens, and the mass of all others together, what they are. So every objective reads whole logits: TAID's target needs
the tail token by token, because it is never less on one bucket of it than on its tokens.

Legend: N positions, B buckets (shared tokens, and the rest), K corrected buckets, R coefficients, E of them in 8 bits,
F in 4, H pairs of those.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..objectives import Head

PARTS = ("low_NK", "high_NQ", "code_NK", "coefficient_NE", "nibble_NH", "scale_N2", "least_N1")
K, EIGHTS, FOURS = 32, 32, 128  # corrected tokens, and coefficients of 8 and of 4 bits, where nothing else is said
NIBBLE = 0.4  # standard deviations of a coefficient, a step of its 4 bits
WEIGHT_POWER = 0.25  # of a bucket's mean probability: its weight in the fit
TILE = 8192  # buckets at a time


def bytes_a_token(buckets: int, k: int, eights: int, fours: int) -> float:
    """Bytes of a stored token."""
    return 8 + k * (3.25 if buckets > 2**16 else 3) + eights + fours / 2


@dataclass(frozen=True)
class Basis:
    """Directions of the logits over the buckets.

    Args:
        vectors_BR: orthogonal in the metric of ``weight_B``; each in units of its coefficient's standard deviation.
        bias_B: the mean.
        weight_B: a bucket's weight in the fit.
        eights: coefficients of 8 bits, the first ones; the others have 4.
    """

    vectors_BR: Tensor
    bias_B: Tensor
    weight_B: Tensor
    eights: int

    @classmethod
    @torch.no_grad()
    def of(cls, logits_NB: Tensor, eights: int, fours: int) -> Basis:
        """Fits log-probabilities by weighted principal components, deterministically.

        Args:
            logits_NB: fp32, of positions that are typical; overwritten.
            eights, fours: coefficients of 8 and of 4 bits, even numbers; fewer where there are too few positions.
        """
        logp_NB = logits_NB.sub_(logits_NB.logsumexp(-1, keepdim=True))
        N, B = logp_NB.shape
        mean_B = logp_NB.new_zeros(B)
        for start in range(0, B, TILE):
            mean_B[start : start + TILE] = logp_NB[:, start : start + TILE].exp().mean(0)
        weight_B = mean_B.clamp_min(1e-9) ** WEIGHT_POWER
        weight_B = (weight_B / weight_B.mean()).half().float()
        logp_NB -= _level(logp_NB, weight_B)
        bias_B = logp_NB.mean(0).half().float()
        logp_NB.sub_(bias_B).mul_(weight_B)
        gram_NN = logp_NB.new_zeros(N, N, dtype=torch.float64)
        for start in range(0, B, TILE):
            tile_Nb = logp_NB[:, start : start + TILE]
            gram_NN += (tile_Nb @ tile_Nb.T).double()
        values_N, vectors_NN = torch.linalg.eigh(gram_NN.cpu())
        rank = int((values_N > 1e-7 * values_N[-1]).sum())
        R = min(eights + fours, max(rank, 2)) // 2 * 2
        top_NR = vectors_NN.flip(1)[:, :R]
        vectors_BR = logp_NB.T @ (top_NR / N**0.5).float().to(logp_NB.device)
        vectors_BR /= weight_B[:, None]
        return cls(vectors_BR.half().float(), bias_B, weight_B, min(eights, top_NR.shape[1]))

    def head(self, has_rest: bool) -> Head:
        """As a language head of the coefficients."""
        B = len(self.bias_B)
        rest = torch.tensor([B - 1], device=self.bias_B.device) if has_rest else None
        return Head(self.vectors_BR, self.bias_B, columns=slice(0, B - has_rest), rest=rest)

    def nothing(self, k: int) -> StoredTokens:
        """No tokens, as this basis stores them."""
        return StoredTokens.of(self.bias_B.new_zeros(0, len(self.bias_B)), self, k)

    def to(self, device: torch.device) -> Basis:
        return Basis(self.vectors_BR.to(device), self.bias_B.to(device), self.weight_B.to(device), self.eights)

    def coefficients(self, logp_NB: Tensor) -> Tensor:
        """The weighted least-squares coefficients [N, R] of log-probabilities."""
        metric_B = self.weight_B.square()
        norm_R = (self.vectors_BR.square() * metric_B[:, None]).sum(0)
        apart_NB = (logp_NB - _level(logp_NB, self.weight_B) - self.bias_B).mul_(metric_B)
        return (apart_NB @ self.vectors_BR) / norm_R.clamp_min(1e-12)

    def save(self, file: Path) -> None:
        """Writes the basis beside and renames it."""
        beside = file.with_suffix(".partial")
        tensors = {name: getattr(self, name).half().cpu().contiguous() for name in ("vectors_BR", "bias_B", "weight_B")}
        save_file(tensors | {"eights": torch.tensor(self.eights)}, beside)
        with open(beside, "rb") as written:
            os.fsync(written.fileno())
        os.rename(beside, file)

    @classmethod
    def load(cls, file: Path, digest: str | None = None) -> Basis:
        """Reads a basis.

        Raises:
            InputError: it is not there, is broken, or its hash is not ``digest``.
        """
        try:
            if digest is not None and file_hash(file) != digest:
                raise InputError(f"{file} is damaged: remove the cache and make it again")
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): remove the cache and run vlm-taid cache again"
            ) from error
        eights = int(tensors.pop("eights"))
        return cls(**{name: tensor.float() for name, tensor in tensors.items()}, eights=eights)


def file_hash(file: Path) -> str:
    """A file's content as a short hash."""
    return hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest()


def _level(logp_NB: Tensor, weight_B: Tensor) -> Tensor:
    """The weighted mean of each row, [N, 1]: no distribution depends on it."""
    metric_B = weight_B.square()
    return (logp_NB @ (metric_B / metric_B.sum()))[:, None]


@dataclass(frozen=True)
class StoredTokens:
    """N positions as they are stored: the corrected buckets' ids in two parts, ascending, and codes of 8 bits; codes
    of the coefficients, of 8 and of 4 bits; [step of the codes, step of the coefficients], and the least correction."""

    low_NK: Any
    high_NQ: Any
    code_NK: Any
    coefficient_NE: Any
    nibble_NH: Any
    scale_N2: Any
    least_N1: Any

    @classmethod
    @torch.no_grad()
    def of(cls, logits_NB: Tensor, basis: Basis, k: int) -> StoredTokens:
        """Stores the distributions of logits.

        Args:
            logits_NB: fp32, over the shared vocabulary and, where there is one, its rest.
            basis: on the same device.
            k: tokens to correct, a multiple of 4 if B is over 65,536.
        """
        logp_NB = logits_NB.float().log_softmax(-1)
        raw_NR = basis.coefficients(logp_NB)
        eight_NE, four_NF = raw_NR[:, : basis.eights], raw_NR[:, basis.eights :]
        step_N1 = _half(eight_NE.abs().amax(-1, keepdim=True) / 127)
        eight_NE = (eight_NE / step_N1).round().clamp(-127, 127)
        four_NF = (four_NF / NIBBLE).round().clamp(-8, 7)
        near_NB = torch.cat([eight_NE * step_N1, four_NF * NIBBLE], -1) @ basis.vectors_BR.T + basis.bias_B
        ids_NK = logp_NB.topk(k, -1).indices.sort(-1).values
        shift_N1 = 0.0  # what brings the corrected buckets to the level of the others
        if k < logp_NB.shape[-1]:
            others = [one.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True) for one in (near_NB, logp_NB)]
            shift_N1 = others[0] - others[1]
        added_NK = logp_NB.gather(-1, ids_NK) - near_NB.gather(-1, ids_NK) + shift_N1
        least_N1 = added_NK.amin(-1, keepdim=True)
        width_N1 = _half((added_NK.amax(-1, keepdim=True) - least_N1) / 255)
        code_NK = ((added_NK - least_N1) / width_N1).round().clamp(0, 255)
        ids = ids_NK.cpu().numpy()
        high_NK = (ids >> 16).astype(np.uint8)
        packed = [high_NK[:, i::4] << (2 * i) for i in range(4)] if logp_NB.shape[-1] > 2**16 else []
        high_NQ = np.bitwise_or.reduce(packed) if packed else np.zeros((len(ids), 0), np.uint8)
        four_NF = (four_NF + 8).to(torch.uint8)
        return cls(
            (ids & 0xFFFF).astype(np.uint16),
            high_NQ,
            code_NK.to(torch.uint8).cpu().numpy(),
            eight_NE.to(torch.int8).cpu().numpy(),
            (four_NF[:, ::2] | four_NF[:, 1::2] << 4).cpu().numpy(),
            torch.cat([width_N1, step_N1], -1).cpu().numpy().astype(np.float16),
            least_N1.cpu().numpy(),
        )

    def read(self) -> dict[str, Tensor]:
        """``coefficients_NR``, ``ids_NK`` and ``added_NK``."""
        ids_NK = self.low_NK.astype(np.int64)
        for i in range(4 if self.high_NQ.shape[1] else 0):
            ids_NK[:, i::4] |= (self.high_NQ.astype(np.int64) >> (2 * i) & 3) << 16
        scale_N2 = self.scale_N2.astype(np.float32)
        four_NF = np.stack([self.nibble_NH & 15, self.nibble_NH >> 4], -1).reshape(
            len(ids_NK), 2 * self.nibble_NH.shape[1]
        )
        coefficients = [self.coefficient_NE * scale_N2[:, 1:], (four_NF.astype(np.float32) - 8) * np.float32(NIBBLE)]
        added_NK = self.code_NK * scale_N2[:, :1] + self.least_N1
        return {
            "coefficients_NR": torch.from_numpy(np.concatenate(coefficients, -1)),
            "ids_NK": torch.from_numpy(ids_NK),
            "added_NK": torch.from_numpy(added_NK),
        }

    @classmethod
    def joined(cls, tokens: Sequence[StoredTokens]) -> StoredTokens:
        parts: list[Any] = [np.concatenate([getattr(one, part) for one in tokens]) for part in PARTS]
        return cls(*parts)

    def __len__(self) -> int:
        return len(self.least_N1)

    def rows(self, at: slice) -> StoredTokens:
        return StoredTokens(*(getattr(self, part)[at] for part in PARTS))

    def checksum(self) -> int:
        return zlib.crc32(b"".join(np.ascontiguousarray(getattr(self, part)).tobytes() for part in PARTS))


def _half(step_N1: Tensor) -> Tensor:
    """A step as it is stored, in 16 bits."""
    return step_N1.clamp(1e-6, 6e4).half().float()
