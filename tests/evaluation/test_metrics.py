"""Each trap that the definitions of the metrics hold."""

import pytest

from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics import CONTRACTIONS, METRICS, normalize_textvqa, normalize_vqa, score


@pytest.mark.parametrize(("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out_of_ten(matching, expected):
    references = ["red"] * matching + [f"other{index}" for index in range(10 - matching)]
    assert score("vqa_accuracy", "red", references) == pytest.approx(expected)


def test_fewer_references_than_ten():
    assert score("vqa_accuracy", "red", ["red"]) == 0
    assert score("vqa_accuracy", "red", ["red"] * 3) == pytest.approx(2 / 3)


def test_annotators_are_told_apart_by_position():
    assert score("vqa_accuracy", "red", [{"answer": "red"}] * 10) == 1.0


def test_identical_references_are_normalised_too():
    assert score("vqa_accuracy", "Red", ["red"] * 10) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A red\ncar\t", "red car"),
        ("t-shirt", "t shirt"),  # no blank beside the mark: a blank is put
        ("red , blue", "red blue"),
        ("t-shirt - blue", "tshirt blue"),  # the mark touches a blank somewhere: deleted everywhere
        ("1,000 t-shirts", "1000 tshirts"),  # digit,comma,digit anywhere: all marks deleted
        ("a,b", "b"),  # the blank comes first, then the article goes
        ("yes?", "yes"),
        ("5.", "5"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("a.m.", "am"),
        ("10:30", "10:30"),
        ("$5 50% #1 & ~ * it's", "$5 50% #1 & ~ * it's"),
        ("None", "0"),
        ("zero one ten eleven", "0 1 10 eleven"),
        ("The man and an apple", "man and apple"),
        ("dont", "don't"),
        ("Im", "im"),  # the capital keys are looked up after lower() and never match
        ("its shes ill well", "its shes ill well"),
        ("couldn'tve couldnt've", "couldn't've couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("x" + "." * 40, "x" + "." * 8),  # at most 32 full stops go
    ],
)
def test_vqa_normalisation(text, normal):
    assert normalize_vqa(text) == normal


def test_contractions_table():
    assert len(CONTRACTIONS) == 120
    assert CONTRACTIONS["somebody'd"] == "somebodyd"
    assert CONTRACTIONS["oclock"] == "o'clock"
    assert CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["Id've"] == CONTRACTIONS["I'dve"] == "I'd've"


def test_textvqa_splits_the_possessive():
    assert normalize_textvqa("Joe's") == normalize_textvqa("joe 's")
    assert score("textvqa_accuracy", "Joe's", ["joe 's"] * 10) == 1.0
    assert score("vqa_accuracy", "Joe's", ["joe 's"] * 10) == 0.0
    assert normalize_textvqa("1,5 t-shirt?") == "15 t shirt"  # the comma goes before the punctuation rule sees it


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("Yes.", "yes", 1), (" t-shirt ", "tshirt", 1), ("t shirt", "t-shirt", 0), ("a cat", "cat", 0), ("2", "two", 0)],
)
def test_gqa_exact_match(prediction, reference, expected):
    assert score("gqa_exact_match", prediction, [reference]) == expected


def test_plain_exact_match():
    assert score("exact_match", " STRASSE ", ["street", "straße"]) == 1  # casefold, not lower
    assert score("exact_match", "yes.", ["yes"]) == 0


@pytest.mark.parametrize("name", METRICS)
def test_no_references_is_an_error(name):
    for nothing in ([], None):
        with pytest.raises(InputError, match="no reference"):
            score(name, "red", nothing)


def test_unknown_metric_and_option():
    with pytest.raises(InputError, match="vqa_accuracy"):
        score("vqa_acuracy", "red", ["red"])
    with pytest.raises(InputError, match="hme"):
        score("exact_match", "red", ["red"], hme=True)


def test_references_are_left_as_they_are():
    references = [{"answer": "The Dog", "answer_id": 1}, {"answer": "a dog", "answer_id": 2}]
    copy = [dict(reference) for reference in references]
    score("vqa_accuracy", "dog", references)
    assert references == copy
