"""SharedVocabulary: which ids mean the same token in both models.

Legend: N positions, V rows of the teacher's head, C shared tokens, R unshared tokens of a model, S special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .encoder import StreamEncoder

MIN_SHARED = 0.05
ROLES = ("eos", "bos", "pad", "unk")


class SharedVocabulary:
    """The tokens that both models know, as a column list for each model's head, in one order.

    Text tokens are the same when they stand for the same bytes, however their tokenizers write these (``Ġthe``,
    ``▁the``); special tokens when their strings are equal or, failing that, their roles (end of turn, end and begin
    of text, padding, unknown). The two end-of-turn tokens are always the same. Sizes say nothing: rows of a head
    that no token names (padding) are in no list.

    Where both tokenizers have text tokens that the other lacks, these make one rest bucket: its probability is the
    sum of theirs. Unshared special tokens are in no bucket, or a student would learn to write them for the teacher's
    unshared text; nor is there one where only one side has unshared text.

    Args:
        student_tokenizer: a tokenizer, a processor or a StreamEncoder; its chat template tells the end-of-turn token.
        teacher_tokenizer: the same of the teacher.

    Attributes:
        student_columns_C: the student's ids of the shared tokens.
        teacher_columns_C: the teacher's ids of the same tokens, in the same order.
        student_rest_R: ids of the student's unshared text tokens; None without a rest bucket.
        teacher_rest_R: ids of the teacher's.
        to_teacher: student's id -> teacher's id.
        end_of_turn: the pair of end-of-turn ids.

    Raises:
        InputError: under 5 % of the smaller vocabulary's text tokens are shared.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any):
        student, teacher = _encoder(student_tokenizer), _encoder(teacher_tokenizer)
        self.end_of_turn = (student.end_of_turn_id, teacher.end_of_turn_id)
        self._names = (_names(student), _names(teacher))
        self._special = (student.token_bytes.special, teacher.token_bytes.special)
        pairs, self._by_bytes = _pairs(student, teacher, *self._names, self.end_of_turn)
        self.to_teacher = dict(sorted(pairs.items()))
        self.student_columns_C = torch.tensor(list(self.to_teacher.keys()), dtype=torch.long)
        self.teacher_columns_C = torch.tensor(list(self.to_teacher.values()), dtype=torch.long)
        self._unshared = tuple(
            sorted(i for i in names if i not in shared and i not in special)
            for names, shared, special in zip(
                self._names, (self.to_teacher.keys(), set(self.to_teacher.values())), self._special, strict=True
            )
        )
        text = sum(i not in self._special[0] for i in self.to_teacher)
        smaller = text + min(len(unshared) for unshared in self._unshared)
        if text < MIN_SHARED * smaller:
            raise InputError(
                f"the student's and the teacher's vocabularies share {text} text tokens of {smaller} in the smaller "
                "one: distillation on logits needs tokens in common; choose a student of the teacher's family"
            )
        self.student_rest_R = self.teacher_rest_R = None
        if all(self._unshared):
            self.student_rest_R, self.teacher_rest_R = (torch.tensor(ids) for ids in self._unshared)

    def __len__(self) -> int:
        return len(self.to_teacher)

    def teacher_rest_mass(self, logits_NV: Tensor) -> Tensor:
        """The teacher's probability [N] of its unshared text tokens, of all that is shared or in the rest bucket.

        Args:
            logits_NV: the teacher's logits on real rows, at paired positions.
        """
        if self.teacher_rest_R is None:
            return logits_NV.new_zeros(logits_NV.shape[0], dtype=torch.float32)
        shared_N, rest_N = (
            logits_NV[:, ids.to(logits_NV.device)].float().logsumexp(-1)
            for ids in (self.teacher_columns_C, self.teacher_rest_R)
        )
        return (rest_N - shared_N).sigmoid()

    def report(self, examples: int = 8) -> VocabularyReport:
        """What is shared and what is not, in numbers and with the first tokens of each kind."""
        counts, named = [], []
        for names, shared, special, unshared in zip(
            self._names, (self.to_teacher, set(self.to_teacher.values())), self._special, self._unshared, strict=True
        ):
            counts.append((len(names), len(unshared), sum(i in special and i not in shared for i in names)))
            named.append(tuple(token for _, token in _bytes_last({i: names[i] for i in unshared})[:examples]))
        mine, theirs = self._names
        written = tuple((mine[i], theirs[self.to_teacher[i]]) for i in self._by_bytes)
        written = tuple(sorted(written, key=lambda pair: pair[1].startswith("<0x")))  # single bytes tell least
        return VocabularyReport(
            shared=len(self),
            student_tokens=counts[0][0],
            teacher_tokens=counts[1][0],
            student_unshared=counts[0][1],
            teacher_unshared=counts[1][1],
            student_unshared_special=counts[0][2],
            teacher_unshared_special=counts[1][2],
            otherwise_written=written[:examples],
            student_examples=named[0],
            teacher_examples=named[1],
            end_of_turn=(mine[self.end_of_turn[0]], theirs[self.end_of_turn[1]]),
            rest_bucket=self.student_rest_R is not None,
        )

    def check_fits(self, student_rows: int, teacher_rows: int) -> None:
        """Refuses a head with fewer rows than its tokenizer has tokens.

        Args:
            student_rows: of the student's language head, padded ones included.
            teacher_rows: of the teacher's.

        Raises:
            InputError: naming the model whose head is too small.
        """
        for name, shared_C, rest_R, rows in (
            ("student", self.student_columns_C, self.student_rest_R, student_rows),
            ("teacher", self.teacher_columns_C, self.teacher_rest_R, teacher_rows),
        ):
            largest = max(int(ids.max()) for ids in (shared_C, rest_R) if ids is not None)
            if largest >= rows:
                raise InputError(
                    f"the {name}'s tokenizer has a token with id {largest} and its language head only "
                    f"{rows} rows: the tokenizer does not belong to the model, or resize_token_embeddings is missing"
                )


@dataclass(frozen=True)
class VocabularyReport:
    """What two vocabularies share: tokens in all, text tokens that the other lacks (``unshared``), special tokens that
    the other lacks, shared tokens that are written differently, and first examples of each, as tokenizers write them.
    """

    shared: int
    student_tokens: int
    teacher_tokens: int
    student_unshared: int
    teacher_unshared: int
    student_unshared_special: int
    teacher_unshared_special: int
    otherwise_written: tuple[tuple[str, str], ...]
    student_examples: tuple[str, ...]
    teacher_examples: tuple[str, ...]
    end_of_turn: tuple[str, str]
    rest_bucket: bool

    def __str__(self) -> str:
        lines = [f"{self.shared:,} shared tokens; end of turn: {self.end_of_turn[0]!r} and {self.end_of_turn[1]!r}"]
        if self.otherwise_written:
            lines.append("the same, written differently: " + _listed(f"{a} = {b}" for a, b in self.otherwise_written))
        for name in ("student", "teacher"):
            tokens, unshared, special, examples = (
                getattr(self, f"{name}_{what}") for what in ("tokens", "unshared", "unshared_special", "examples")
            )
            lines.append(
                f"the {name}'s {tokens:,}: {unshared:,} text tokens and {special:,} special ones are its own"
                + (f", as {_listed(examples)}" if examples else "")
            )
        if self.rest_bucket:
            lines.append("the text tokens that only one has make one rest bucket")
        return "\n".join(lines)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def _encoder(tokenizer: Any) -> StreamEncoder:
    return tokenizer if isinstance(tokenizer, StreamEncoder) else StreamEncoder(tokenizer)


def _names(encoder: StreamEncoder) -> dict[int, str]:
    return {i: token for token, i in encoder.tokenizer.get_vocab().items()}


def _pairs(
    student: StreamEncoder, teacher: StreamEncoder, mine: dict[int, str], theirs: dict[int, str], end: tuple[int, int]
) -> tuple[dict[int, int], list[int]]:
    """Student's id -> teacher's id, and those of them that are written differently in the two tokenizers."""
    pairs, taken, by_bytes = {end[0]: end[1]}, {end[1]}, []

    def add(i: int, j: int | None) -> bool:
        if j is None or i in pairs or j in taken:
            return False
        pairs[i] = j
        taken.add(j)
        return True

    # the same string, where it means the same: first, so that equal tokenizers map each id to itself
    ids = {token: i for i, token in theirs.items()}
    a, b = student.token_bytes, teacher.token_bytes
    for i, token in mine.items():
        j = ids.get(token)
        if j is None:
            continue
        same_text = i not in a.special and j not in b.special and a.of(i, token) == b.of(j, token)
        if same_text or (i in a.added and j in b.added):
            add(i, j)
    # the same bytes; of two tokens with the same bytes, a piece of text comes before a single byte's stand-in
    texts: dict[bytes | None, int] = {}
    for j, token in _bytes_last(theirs):
        if j not in taken and j not in b.special:
            texts.setdefault(b.of(j, token), j)
    texts.pop(None, None)
    for i, token in _bytes_last(mine):
        if i not in a.special and add(i, texts.get(a.of(i, token))):
            by_bytes.append(i)
    for role in ROLES:
        i, j = (getattr(encoder.tokenizer, f"{role}_token_id") for encoder in (student, teacher))
        if i is not None:
            add(i, j)
    return pairs, by_bytes


def _bytes_last(names: dict[int, str]) -> list[tuple[int, str]]:
    """By id, the stand-ins for single bytes after all others."""
    return sorted(names.items(), key=lambda item: (item[1].startswith("<0x"), item[0]))
