"""Task metrics over the rows' columns: what the benchmarks' own traps give, line by line and in sum."""

import pytest

from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import choices_of, references_of
from vlm_taid.evaluation.metrics import score
from vlm_taid.evaluation.scoring import SCORINGS, scoring, summary

ABCD = {"A": "dog", "B": "bird", "C": "cat", "D": "fish"}


def lines(metric, *rows):
    """Lines of (answer, row, references)."""
    found = scoring(metric)
    made = []
    for number, (answer, doc, target) in enumerate(rows):
        parsed, value = found.read(answer, doc, target)
        made.append({"doc_id": number, "doc": doc, "target": target, "filtered_resps": [answer], "parsed": parsed,
                     found.key: value, "category": doc.get("category")})  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        # all ten annotators equal: the official code compares as it stands
        ("vqa_accuracy_official", "Red", ["red"] * 10, 0), ("vqa_accuracy", "Red", ["red"] * 10, 1),
        ("vqa_accuracy_official", "red", ["red"] * 10, 1), ("vqa_accuracy_official", "a\nred", ["a red"] * 10, 1),
        ("vqa_accuracy_official", "Red", ["red"] * 9 + ["blue"], 1),
        ("vqa_accuracy_vlmevalkit", "Red", ["red"] * 10, 1),
        # a full stop after a digit
        ("vqa_accuracy_vlmevalkit", "5.", ["5"] * 10, 0), ("vqa_accuracy", "5.", ["5"] * 10, 1),
        ("vqa_accuracy_vlmevalkit", "red.", ["red"] * 10, 1), ("vqa_accuracy_vlmevalkit", "3.5", ["3.5"] * 10, 1),
        ("gqa_exact_match_vlmevalkit", "Yes.", ["yes"], 0), ("gqa_exact_match", "Yes.", ["yes"], 1),
        ("gqa_exact_match_vlmevalkit", " YES ", ["yes"], 1), ("gqa_exact_match_vlmevalkit", "t-shirt", ["tshirt"], 0),
    ],
)  # fmt: skip
def test_flavors_of_the_same_question(metric, prediction, references, expected):
    assert score(metric, prediction, references) == pytest.approx(expected)


def test_yes_and_no():
    rows = [("Yes, it is.", {}, ["yes"]), ("no", {}, ["No"]), ("yes and no", {}, ["yes"]), ("no", {}, ["yes"])]
    found = summary(lines("yesno", *rows), "yesno")
    assert found["accuracy,none"] == 0.5 and found["n_unparsed"] == 1


def test_a_number_is_an_index_or_an_option():
    counts = {"options": ["1", "2", "3", "4"], "answer": "1"}  # AI2D: the second option
    assert references_of(counts, "row", choice=True) == ["B"]
    assert references_of({"choices": ["1", "2"], "answer": 0}, "row", choice=True) == ["A"]
    problem = {"choices": ["1", "2"], "answer": "1", "question_type": "multi_choice", "answer_type": "text"}
    assert (
        lines("mathvista", ("(A)", problem, ["1"]), ("(B)", problem, ["1"]))[0]["accuracy"] == 1
    )  # MathVista: the first


def test_options_inside_the_question():
    """MMStar on the hub; where they cannot be told apart, the letter is still read."""
    row = {"question": "What is it?\nOptions: A: a dog, B: vitamin B, C: cat, D: fish", "answer": "C"}
    assert choices_of(row) == {"A": "a dog", "B": "vitamin B", "C": "cat", "D": "fish"}
    row = {"question": "What is it?\nOptions: A: dog, B: vitamin A: good, C: cat, D: fish", "answer": "C"}
    assert choices_of(row) == dict.fromkeys("ABCD", "")
    made = lines("mcq_vlmevalkit", ("C", row, ["C"]), ("cat", row, ["C"]))
    assert [line["parsed"] for line in made] == ["C", None]
    assert choices_of({"question": "Which colour?", "answer": "red"}) == {}


def test_an_answer_that_means_nothing_is_wrong_and_counted():
    for metric in ("mcq_vlmevalkit", "mcq_lmms", "mmmu", "mmmu_lmms"):
        found = summary(lines(metric, ("why?", ABCD, ["A"]), ("A", ABCD, ["A"])), metric)
        assert (found["accuracy,none"], found["n_unparsed"], found["sample_len"]) == (0.5, 1, 2), metric
    refused = summary(lines("mcq_vlmevalkit", ("I can't process this file.", ABCD, ["A"])), "mcq_vlmevalkit")
    assert refused["n_unparsed"] == 0 and refused["accuracy,none"] == 0  # understood: a refusal


def test_open_questions_of_mmmu():
    row = {"options": "[]", "question_type": "open"}
    # VLMEvalKit: a choice between the answer and "Other Answers"
    kit = summary(lines("mmmu", ("it is 7", row, ["7"]), ("A", row, ["7"]), ("8", row, ["7"])), "mmmu")
    assert kit["accuracy,none"] == pytest.approx(2 / 3) and kit["n_unparsed"] == 1
    official = summary(lines("mmmu_lmms", ("it is 7", row, ["7"]), ("A", row, ["7"])), "mmmu_lmms")
    assert official["accuracy,none"] == 0.5


def test_circular_needs_all_rotations():
    rows = [("A", 3, "A"), ("B", 1_000_003, "B"), ("A", 4, "A"), ("C", 1_000_004, "B"), ("", 5, "A")]
    made = lines("mmbench_circular", *((answer, {"index": index, **ABCD}, [right]) for answer, index, right in rows))
    found = summary(made, "mmbench_circular")
    assert found["accuracy,none"] == pytest.approx(1 / 3) and found["questions,none"] == 3
    assert found["vanilla,none"] == pytest.approx(3 / 5) and found["accuracy_stderr,none"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="column index is 'x'"):
        summary(lines("mmbench_circular", ("A", {"index": "x", **ABCD}, ["A"])), "mmbench_circular")


def test_mmstar_of_lmms_is_a_mean_of_means():
    rows = [("A", {"l2_category": group, **ABCD}, [right]) for group, right in zip("aaab", "AAAB", strict=True)]
    assert summary(lines("mmstar_lmms", *rows), "mmstar_lmms")["accuracy,none"] == 0.5
    assert summary(lines("mcq_vlmevalkit", *rows), "mcq_vlmevalkit")["accuracy,none"] == 0.75


def test_pope_averages_the_categories():
    rows = [("yes", "yes", "random"), ("no", "no", "random"), ("yes", "no", "popular"), ("yes", "yes", "popular")]
    made = [(answer, {"category": category}, [label]) for answer, label, category in rows]
    official = summary(lines("pope_official", *made), "pope_official")
    assert official["f1,none"] == pytest.approx(0.8)  # two right, one false
    assert official["right,none"] == official["mean_f1,none"] == pytest.approx((1 + 2 / 3) / 2)
    assert official["yes_ratio,none"] == 0.75  # of the answers
    assert summary(lines("pope_vlmevalkit", *made), "pope_vlmevalkit")["right,none"] == pytest.approx(0.8)
    lmms = summary(lines("pope_lmms", *made), "pope_lmms")
    assert lmms["right,none"] == 0.75 and lmms["yes_ratio,none"] == 0.5  # of the labels
    assert lines("pope_lmms", ("Yes.", {}, ["yes"]))[0]["parsed"] is None


def test_mme_is_a_share_of_its_points():
    from vlm_taid.evaluation.metrics.yesno import COGNITION, PERCEPTION

    rows = [
        ("Yes" if right == "yes" else "No.", {"category": category, "question_id": f"{category}/1.png"}, [right])
        for category in PERCEPTION + COGNITION
        for right in ("yes", "no")
    ]
    found = summary(lines("mme_vlmevalkit", *rows), "mme_vlmevalkit")
    assert found["right,none"] == 1.0 and found["perception,none"] == 2000 and found["unpaired,none"] == 0
    found = summary(lines("mme_vlmevalkit", *rows[:-1]), "mme_vlmevalkit")  # a limit, say
    assert found["right,none"] is None and found["perception,none"] == 2000 and found["unpaired,none"] == 1
    by_picture = [(answer, {"category": doc["category"], "image": ["hash"]}, target) for answer, doc, target in rows]
    assert summary(lines("mme_lmms", *by_picture), "mme_lmms")["right,none"] == 1.0


def test_hallusionbench_by_columns_or_index():
    ids = [("0", "0", "1"), ("0", "1", "0"), ("1", "0", "1"), ("1", "1", "0")]
    answers = ["yes", "no", "Yes.", "I cannot tell"]
    hub = [
        (answer, {"subcategory": "s", "set_id": "0", "figure_id": figure, "question_id": question}, [right])
        for answer, (figure, question, right) in zip(answers, ids, strict=True)
    ]
    kit = [
        (answer, {"l2-category": "s", "index": f"a_b_s_0_{figure}_{question}"}, ["Yes" if right == "1" else "No"])
        for answer, (figure, question, right) in zip(answers, ids, strict=True)
    ]
    for rows in (hub, kit):
        found = summary(lines("hallusionbench", *rows), "hallusionbench")
        assert [found[f"{name},none"] for name in ("aAcc", "fAcc", "qAcc")] == [0.75, 0.5, 0.5]
        assert found["accuracy,none"] == pytest.approx(1.75 / 3) and found["n_unparsed"] == 1
    with pytest.raises(InputError, match="no six parts"):
        summary(lines("hallusionbench", ("yes", {"index": "a_b"}, ["1"])), "hallusionbench")


def test_a_second_model_gets_no_points_of_the_first():
    made = lines("ocrbench", ("red", {"dataset": "x"}, ["red"]), ("blue", {"dataset": "x"}, ["red"]))
    assert [summary(made, "ocrbench")["accuracy,none"] for _ in range(2)] == [0.5, 0.5]


@pytest.mark.parametrize("metric", SCORINGS)
def test_nothing_scored_is_no_score(metric):
    failed = {
        "doc_id": 0,
        "doc": {},
        "target": [],
        "filtered_resps": [""],
        "parsed": None,
        "category": None,
        "error": "x",
    }
    found = summary([failed], metric)
    assert found[f"{SCORINGS[metric].key},none"] is None and found["n_errors"] == 1 and found["sample_len"] == 0


def test_unknown_metrics_are_named():
    with pytest.raises(InputError, match=r"unknown metric 'mcq'; known: .*mcq_lmms"):
        scoring("mcq")
