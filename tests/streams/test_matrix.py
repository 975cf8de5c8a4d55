"""Pairs of families on real rows: the positions that pair predict the same text in both streams."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import pytest

from tests import families, kinds
from tests.streams.oracle import Side, check_pictures, check_positions
from tests.streams.rows import exchanges, fetched_leads, sample
from vlm_taid.data import Conversation, DataOptions, Turn
from vlm_taid.pretrained import load_processor
from vlm_taid.streams import PairedCollator, SharedVocabulary, StreamEncoder, same_processing


@dataclass(frozen=True)
class Pair:
    student: str
    teacher: str
    student_tokenizer: str | None = None
    teacher_tokenizer: str | None = None
    teacher_options: dict = field(default_factory=dict, hash=False)
    shared: bool = False

    def __str__(self) -> str:
        return "-".join(
            part for part in (self.student, self.student_tokenizer, self.teacher, self.teacher_tokenizer,
                              "more" if self.teacher_options else None) if part
        )  # fmt: skip


def more(family: str) -> Pair:
    return Pair(family, family, teacher_options=families.MORE_IMAGE_TOKENS[family])


PAIRS = [
    # one processor
    Pair("internvl", "internvl", teacher_options={"seed": 1}, shared=True),
    # one family, other image-token counts
    *(more(name) for name in ("llava", "llava_onevision", "qwen2_5_vl", "internvl", "smolvlm", "gemma3")),
    # other families over one tokenizer: other ends of turn, leading blanks, newlines, begins of text
    Pair("qwen2_5_vl", "internvl"),
    Pair("smolvlm", "llava_next"),
    Pair("gemma3", "pixtral"),
    Pair("fast_vlm", "perception_lm"),
    Pair("llava", "qwen3_vl"),
    Pair("mistral3", "qwen3_5"),
    # other tokenizers
    Pair("qwen2_vl", "llava", teacher_tokenizer="sentencepiece"),
    Pair("gemma3", "internvl", student_tokenizer="sentencepiece", teacher_tokenizer="byte_level"),
    Pair("smolvlm", "mistral3", student_tokenizer="byte_level_small", teacher_tokenizer="sentencepiece_first"),
    Pair("smolvlm", "qwen3_vl", student_tokenizer="smollm2", teacher_tokenizer="qwen"),
    # attention that sees the question whole; one question a row
    more("paligemma"),
    Pair("paligemma", "gemma3"),
    Pair("internvl", "paligemma", student_tokenizer="byte_level", teacher_tokenizer="sentencepiece"),
    # text alone
    Pair("llama3", "qwen2_5_vl"),
    Pair("phi3", "gemma3"),
    Pair("qwen3", "smolvlm", student_tokenizer="byte_level", teacher_tokenizer="sentencepiece"),
]


class Room:
    """A pair's encoders, collator and oracle sides."""

    def __init__(self, pair: Pair):
        sides = []
        for family, tokenizer, options in (
            (pair.student, pair.student_tokenizer, {}),
            (pair.teacher, pair.teacher_tokenizer, pair.teacher_options),
        ):
            tok = {"tok": kinds.kind(tokenizer)} if tokenizer else {}
            processor = load_processor(families.made(family, **options, **tok))
            sides.append(Side(family, processor, bool(tokenizer and tokenizer.startswith("sentencepiece"))))
        self.sides = sides
        mine, theirs = (StreamEncoder(side.processor) for side in sides)
        self.vocabulary = SharedVocabulary(mine, theirs)
        assert same_processing(mine, theirs) == pair.shared
        options = DataOptions(train=[], min_paired_share=0.0)
        self.collate = PairedCollator(mine, mine if pair.shared else theirs, self.vocabulary, options)
        self.one_turn = "paligemma" in (pair.student, pair.teacher)
        images, texts = sample()
        self.rows = self.taken(images if mine.takes_images else texts)

    def taken(self, rows: Sequence[Conversation]) -> list[Conversation]:
        """The rows in the form that both models take."""
        return [one for row in rows for one in exchanges(row)] if self.one_turn else list(rows)

    def check(self, rows: Sequence[Conversation], size: int = 24) -> int:
        """Checks all rows' positions and the first batch's pictures; the number of pairs."""
        paired = 0
        for start in range(0, len(rows), size):
            batch = self.collate(rows[start : start + size])
            check_positions(batch, rows[start : start + size], *self.sides)
            if start == 0:
                check_pictures(batch, rows[:size], *self.sides)
            paired += len(batch["labels_N"])
        return paired


@cache
def room(pair: Pair) -> Room:
    return Room(pair)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_paired_positions_predict_the_same_text(pair):
    here = room(pair)
    assert len(here.rows) >= 200
    assert here.check(here.rows) > 3 * len(here.rows)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_leads_of_wikipedia(pair):
    """Longer answers, with the scripts, dashes and quotes that they have."""
    here = room(pair)
    assert here.check(here.taken(fetched_leads(12))) > 40 * 12


def positions(key, by):
    def change(batch, at):
        batch[key] = batch[key].clone()
        batch[key][at] += by

    return change


def label(batch, at):
    batch["labels_N"] = batch["labels_N"].clone()
    batch["labels_N"][at] += 1


MUTANTS = {
    f"{model} {by:+d}": positions(f"{model}_rows_N", by) for model in ("student", "teacher") for by in (1, -1)
} | {"label": label}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_the_oracle_sees_a_shift_of_any_position(pair):
    here = room(pair)
    rows = here.rows[:4]
    batch = here.collate(rows)
    check_positions(batch, rows, *here.sides)
    for name, mutate in MUTANTS.items():
        for at in range(len(batch["labels_N"])):
            mutant = type(batch)(batch)
            mutate(mutant, at)
            with pytest.raises(AssertionError):
                check_positions(mutant, rows, *here.sides)
                raise RuntimeError(f"{name} of answer token {at} goes unseen")


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.student not in families.TEXT_ONLY], ids=str)
@pytest.mark.parametrize("model", [0, 1], ids=["student", "teacher"])
def test_the_oracle_sees_swapped_pictures(pair, model):
    here = room(pair)
    first, *others = (row for row in here.rows if len(row.images) == 1 and len(row.turns) == 2)
    pixels = first.images[0].tobytes()
    rows = [first, next(row for row in others if row.images[0].tobytes() != pixels)]
    check_pictures(here.collate(rows), rows, *here.sides)
    swapped = [
        Conversation((Turn("user", (other.turns[0].parts[0], *row.turns[0].parts[1:])), *row.turns[1:]), row=row.row)
        for row, other in zip(rows, reversed(rows), strict=True)
    ]
    batch, mutant = here.collate(rows), here.collate(swapped)
    for name in ("student", "teacher") if here.collate.shared else [("student", "teacher")[model]]:
        batch[name] = mutant[name]
    with pytest.raises(AssertionError, match="other pictures"):
        check_pictures(batch, rows, *here.sides)
