"""Perplexity of a language model on held-out text, and how close it is to a teacher there.

Legend of shapes: B windows, T positions, N scored tokens, H model width, G teacher width, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from vlm_taid.data.sources import ConversationDataset, SourceOptions
from vlm_taid.errors import BadRow, InputError
from vlm_taid.objectives import Head, HiddenSignal, as_slice, measure
from vlm_taid.streams import SharedVocabulary

LONGEST = 2048  # tokens of a window, unless told otherwise
SUMS = ("nll", "teacher_nll", "kl", "same_top", "tokens")


@dataclass(frozen=True)
class Document:
    """A text of its own: nothing before it is context of it.

    Args:
        row: where it comes from, as ``file:number``.
        text: not empty.
    """

    row: str
    text: str

    @property
    def words(self) -> int:
        """Its pieces between blanks."""
        return len(self.text.split())

    @property
    def bytes(self) -> int:
        """Its length in UTF-8."""
        return len(self.text.encode())


def read_documents(
    path: str, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> tuple[list[Document], int]:
    """The documents of a file, and how many it has whatever the limit.

    Args:
        path: a .txt file, which is one document; or rows with a column ``text``, a document each (.jsonl, .json, .csv,
            .tsv, .parquet, a saved data set or a hub id).
        columns: the column's name there, as {"text": "content"}.
        limit: only the first so many.

    Raises:
        InputError: the file is missing, of an unknown kind, or empty; a row has no text.
    """
    if Path(path).suffix == ".txt":
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: cannot be read as UTF-8: {error}") from error
        if not text.strip():
            raise InputError(f"{path}: the text is empty")
        return [Document(path, text)], 1
    dataset = ConversationDataset([SourceOptions(path=path, format="text", columns=dict(columns or {}))])
    documents = []
    for index in range(min(len(dataset), limit or len(dataset))):
        row: Any = dataset[index]  # on_bad_row is "error"
        documents.append(Document(row.row, row.turns[-1].text))
    return documents, len(dataset)


class Window(NamedTuple):
    """A piece of a document: the ids that the model reads, and those that its last positions predict."""

    document: int
    inputs: list[int]
    targets: list[int]


def windows(document: int, prefix: int, ids: Sequence[int], max_length: int, stride: int) -> Iterator[Window]:
    """Windows of at most ``max_length`` inputs in which each of a document's tokens is predicted once.

    The first predicts up to ``max_length`` tokens, the first of them from the prefix alone; each further one predicts
    the next ``stride`` tokens (the last one what is left) with ``max_length - stride`` tokens or more before them.
    ``stride`` = ``max_length`` are lm-eval's rolling windows.

    Args:
        document: its index.
        prefix: the id before the text.
        ids: the text's tokens.
        max_length, stride: in tokens, 1 <= stride <= max_length.
    """
    stream = [prefix, *ids]
    end = min(max_length, len(ids))
    yield Window(document, stream[:end], stream[1 : end + 1])
    while end < len(ids):
        start, end = end, min(end + stride, len(ids))
        yield Window(document, stream[max(0, end - max_length) : end], stream[start + 1 : end + 1])


def prefix_id(tokenizer: Any, name: str | None) -> int:
    """The id before a text's first token: begin of text or, where there is none, end of text; InputError if neither."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise InputError(
            f"{name}: its tokenizer has no begin and no end of text, from which a first token is predicted"
        )
    return int(found)


class Reader:
    """A model with its tokenizer and its proven head, as a reader of plain text."""

    def __init__(self, model: PreTrainedModel, processor: Any, name: str | None = None):
        self.model: Any = model.eval()
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.processor, self.tokenizer = processor, getattr(processor, "tokenizer", processor)
        self.prefix = prefix_id(self.tokenizer, self.name)
        self.head = Head.of(model)

    @property
    def longest(self) -> int:
        """The most positions that its config names."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or LONGEST

    def ids(self, document: Document) -> list[int]:
        """The text's tokens, without special ones around it; BadRow if there are none."""
        ids = self.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise BadRow(document.row, f"the tokenizer of {self.name} makes no token of the text")
        return ids

    def hidden(self, inputs: Sequence[Sequence[int]], scored: Sequence[int]) -> Tensor:
        """Hidden states [N, H] at the last ``scored[i]`` positions of each input."""
        T = max(map(len, inputs))
        ids_BT = torch.tensor([[*row, *[self.prefix] * (T - len(row))] for row in inputs], device=self.model.device)
        lengths_B1 = torch.tensor([[len(row)] for row in inputs], device=self.model.device)
        first_B1 = lengths_B1 - torch.tensor(scored, device=self.model.device)[:, None]
        place_1T = torch.arange(T, device=self.model.device)[None]
        # padding is on the right: no position before it sees it
        hidden_BTH = self.model.base_model(
            input_ids=ids_BT, attention_mask=(place_1T < lengths_B1).long(), use_cache=False
        ).last_hidden_state
        return hidden_BTH[(place_1T >= first_B1) & (place_1T < lengths_B1)]


def check_same_tokens(student: Reader, teacher: Reader, document: Document, ids: Sequence[int]) -> None:
    """Refuses a teacher whose tokens of a text are others.

    Raises:
        InputError.
    """
    if [teacher.prefix, *teacher.ids(document)] != [student.prefix, *ids]:
        raise InputError(
            f"{document.row}: {teacher.name} cuts the text into other tokens than {student.name}: their distributions "
            "do not stand at the same places. Leave --teacher out, run each model by itself and compare byte_perplexity"
        )


@torch.inference_mode()
def text_sums(
    student: Reader,
    documents: Sequence[Document],
    *,
    teacher: Reader | None = None,
    max_length: int,
    stride: int,
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """Sums over each document's tokens, [D, 5], fp64, in the order of ``SUMS``; over all ranks.

    They do not depend on batch size, ranks or the documents' order but by rounding.

    Args:
        student: the model.
        documents: what is read; every rank must give the same.
        teacher: a model of the same tokens.
        max_length, stride: see `windows`.
        batch_size: windows in a batch, per rank.
        progress: show a bar on rank 0.

    Raises:
        InputError: the teacher's tokens of a text are others, a text has none, or a size is below 1.
    """
    if batch_size < 1 or not 1 <= stride <= max_length:
        raise InputError(
            f"batch_size ({batch_size}) and stride ({stride}) must be at least 1, and the stride at most max_length "
            f"({max_length})"
        )
    mine, theirs = student.head, None
    if teacher is not None:
        shared = SharedVocabulary(student.processor, teacher.processor)
        device = student.model.device
        mine, theirs = (
            replace(
                reader.head,
                columns=as_slice(columns_C.to(device)),
                rest=None if shared.student_rest_R is None or rest_R is None else rest_R.to(device),
            )
            for reader, columns_C, rest_R in (
                (student, shared.student_columns_C, shared.student_rest_R),
                (teacher, shared.teacher_columns_C, shared.teacher_rest_R),
            )
        )
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    pieces: list[Window] = []
    for number, document in enumerate(documents):
        ids = student.ids(document)
        if teacher is not None:
            check_same_tokens(student, teacher, document, ids)
        pieces += windows(number, student.prefix, ids, max_length, stride)
    pieces = sorted(pieces, key=lambda piece: -len(piece.inputs))[rank::ranks]  # the longest first: memory shows
    sums_D5 = torch.zeros(len(documents), len(SUMS), dtype=torch.float64, device=student.model.device)
    starts = range(0, len(pieces), batch_size)
    for start in tqdm(starts, desc="text", unit="batch", disable=rank > 0 or not progress, mininterval=0.5):
        batch = pieces[start : start + batch_size]
        inputs, scored = [piece.inputs for piece in batch], [len(piece.targets) for piece in batch]
        labels_N = torch.tensor([i for piece in batch for i in piece.targets], device=student.model.device)
        signal = None
        if teacher is not None and theirs is not None:
            signal = HiddenSignal(teacher.hidden(inputs, scored), theirs)
        found = measure(student.hidden(inputs, scored), mine, labels_N, signal)
        values = [found.nll_N, found.teacher_nll_N, found.kl_N, found.same_top_N]
        values_N5 = torch.stack(
            [torch.zeros_like(found.nll_N) if value_N is None else value_N for value_N in values]
            + [torch.ones_like(found.nll_N)],
            -1,
        ).double()
        document_N = [piece.document for piece in batch for _ in piece.targets]
        sums_D5.index_add_(0, torch.tensor(document_N, device=sums_D5.device), values_N5)
    if ranks > 1:
        dist.all_reduce(sums_D5)
    return sums_D5.cpu()
