"""Sums, comparisons and files, from samples made by hand."""

import copy
import json
import math

import pytest

from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation import (
    Results,
    Score,
    Task,
    agreement,
    agreements,
    blind_baseline,
    compare,
    discordant,
    paired_test,
    read_samples,
)
from vlm_taid.evaluation.gallery import choose_rows
from vlm_taid.evaluation.readers import Row
from vlm_taid.evaluation.results import sample_line

TASK = Task("colors", SourceOptions(path="colors.jsonl", format="vqa"), metric="exact_match")


def make(answers, name="tiny", run=None, **config):
    """Results for six rows whose right answer is always yes."""
    rows = [
        Row(index, {"question": f"q{index}\u2028?"}, ["yes"], "ab"[index % 2], f"prompt {index}", [])
        for index in range(len(answers))
    ]
    lines = [sample_line(row, answer, TASK) for row, answer in zip(rows, answers, strict=True)]
    return Results.of(
        {"colors": TASK},
        {"colors": lines},
        {"colors": 6},
        model_name=name,
        config={"num_params": 1_500_000, **config},
        chat_template="{{ x }}",
        run=run or {"date": "2026-01-01T00:00:00.000000+00:00"},
    )


def test_scores():
    results = make(["yes", "no", "Yes ", "yes", "", "yes"])
    score = results.score("colors")
    assert score.value == pytest.approx(4 / 6) and score.count == 6
    assert score.stderr == pytest.approx(math.sqrt(6 * (4 / 6) * (2 / 6) / 5) / math.sqrt(6))
    assert results.score("colors", "a").value == pytest.approx(2 / 3)  # rows 0, 2, 4
    assert results.data["results"]["colors"]["n_unparsed"] == 1
    assert results.data["configs"]["colors"]["flavor"] == "vlm_taid"
    assert Score.mean([1.0]).stderr is None
    assert "66.7 ± 21.1" in results.markdown()


def test_saved_and_loaded(tmp_path):
    results = make(["yes", "no", "yes"], name="some/model: 1")
    path = results.save(tmp_path)
    assert path.parent.name == "some__model__1"
    assert path.name == "results_2026-01-01T00-00-00.000000.json"
    for place in (tmp_path, path):
        loaded = Results.load(place)
        assert loaded.data == results.data and loaded.samples == results.samples
    line = read_samples(next(tmp_path.rglob("samples_colors_*.jsonl")))[1]
    assert line["exact_match"] == 0.0 and line["target"] == ["yes"] and line["category"] == "b"


def test_broken_files(tmp_path):
    with pytest.raises(InputError, match="no results"):
        Results.load(tmp_path)
    (tmp_path / "results_x.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a results file"):
        Results.load(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(InputError, match=r"samples\.jsonl:2"):
        read_samples(tmp_path / "samples.jsonl")


def test_scoring_leaves_documents_unchanged():
    row = Row(0, {"question": "Q, a?", "answers": [{"answer": "The Dog"}] * 3}, ["The Dog"] * 3, None, "p", [])
    before = copy.deepcopy(row)
    vqa = Task("t", SourceOptions(path="x", format="vqa"), metric="vqa_accuracy")
    line = sample_line(row, " a dog. ", vqa)
    assert row == before
    assert line["doc"] == row.doc and line["target"] == ["The Dog"] * 3
    assert line["parsed"] == "dog" and line["exact_match"] == pytest.approx(2 / 3)
    assert sample_line(row, " a dog. ", vqa) == line


def test_agreement():
    a, b = make(["yes", "no", "Red", "x"]), make(["yes", "yes", " red", "y"])
    assert agreements(a.samples["colors"], b.samples["colors"]) == [True, False, True, False]
    score = agreement(a.samples["colors"], b.samples["colors"])
    assert score.value == 0.5 and score.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    with pytest.raises(InputError, match="same questions"):
        agreements(a.samples["colors"], b.samples["colors"][:3])


@pytest.mark.parametrize(
    ("better_a", "better_b", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (6, 0, 2 / 64),
        (1, 7, 2 * (1 + 8) / 256),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_exact_mcnemar(better_a, better_b, p):
    assert paired_test(better_a, better_b) == pytest.approx(p, rel=1e-12)
    assert paired_test(better_b, better_a) == paired_test(better_a, better_b)


def test_exact_mcnemar_of_many_rows():
    assert 0 < paired_test(5200, 4800) < 1e-4
    assert paired_test(9000, 0) == 0.0  # below the smallest float


def test_discordant():
    assert discordant([True, True, False, False, True], [True, False, True, False, False]) == (2, 1)


def test_blind_baseline():
    train = [
        {"question": "Is it red?", "answer": "no"},
        {"question": "is it red? ", "answer": "yes"},
        {"question": "is it red?", "answer": "yes"},
        {"question": "what colour?", "answers": ["blue", "navy"]},
        {"question": "what colour?", "answer": "red"},  # a tie: the first one seen is taken
        {"question": "why?", "answer": "no"},
        {"question": "why?", "answer": "no"},
    ]
    test = [
        {"question": "is it red?", "answer": "yes", "category": "yes/no"},
        {"question": "what colour?", "answer": "blue", "category": "open"},
        {"question": "never asked", "answer": "no", "category": "open"},
        {"question": "why?", "answer": "yes", "category": "open"},
    ]
    results = blind_baseline(train, test, task="colors")
    assert [line["filtered_resps"][0] for line in results.samples["colors"]] == ["yes", "blue", "no", "no"]
    assert results.score("colors").value == 0.75
    assert results.score("colors", "yes/no").value == 1.0
    with pytest.raises(InputError, match="training rows"):
        blind_baseline([], test)


def test_compare(tmp_path):
    make(["yes"] * 6, name="teacher").save(tmp_path / "teacher")
    make(["yes"] * 5 + ["no"], name="student").save(tmp_path / "student")
    make(["no"] * 5 + ["no"], name="student", run={"date": "2026-01-02"}, shuffle_images=True).save(
        tmp_path / "student"
    )
    comparison = compare([f"big={tmp_path / 'teacher'}", tmp_path / "student"])
    head, rows = comparison.table()
    assert head == ["model", "parameters", "all", "a", "b", "wrong picture", "agrees with big"]
    assert rows == [
        ["big", "1.50 M", "100.0 ± 0.0", "100.0 ± 0.0", "100.0 ± 0.0", "–", "–"],
        ["student", "1.50 M", "83.3 ± 16.7", "100.0 ± 0.0", "66.7 ± 33.3", "0.0 ± 0.0", "83.3 ± 16.7"],
    ]
    with pytest.raises(InputError, match="labelled"):
        compare([tmp_path / "student"], reference="teacher")
    with pytest.raises(InputError, match="not a results file"):
        compare([tmp_path / "nothing"])


def test_a_newer_evaluation_replaces_an_older_one(tmp_path):
    make(["no"] * 6, run={"date": "2026-01-01"}).save(tmp_path)
    make(["yes"] * 6, run={"date": "2026-01-03"}).save(tmp_path)
    assert compare([tmp_path]).table()[1][0][2] == "100.0 ± 0.0"


def test_rows_that_differ_come_first():
    flags = [(False, False)] * 8 + [(False, True)] * 8 + [(True, True)]
    questions = [(f"picture {index}", "what?") for index in range(len(flags))]
    chosen = choose_rows(questions, flags, 8)
    assert len(chosen) == len(set(chosen)) == 8
    differing = [any(flags[row]) for row in chosen]
    assert differing == sorted(differing, reverse=True) and sum(differing) == 6
    assert 16 in chosen  # the rare pattern
    assert len(choose_rows(questions, [(False, False)] * len(flags), 8)) == 8
    assert len(choose_rows(questions, [(True, False)] * len(flags), 8)) == 8
    assert len(choose_rows(questions[:3], flags[:3], 8)) == 3
    few = [(f"picture {index % 4}", f"{index % 2}") for index in range(len(flags))]
    chosen = choose_rows(few, [(True, False)] * len(flags), 4)
    assert len({few[row][0] for row in chosen}) == 4  # new pictures first
    assert len(choose_rows([("same", "same")] * len(flags), [(True, False)] * len(flags), 8)) == 1


def test_results_are_json(tmp_path):
    json.loads(make(["yes"] * 2).save(tmp_path).read_text(), parse_constant=pytest.fail)
