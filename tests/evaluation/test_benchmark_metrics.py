"""The traps of the benchmarks' own metrics: each line is a case on which two harnesses disagree, or that surprises."""

import copy

import pytest

from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics import NAMES, score
from vlm_taid.evaluation.metrics.yesno import COGNITION, PERCEPTION

ABCD = {"A": "dog", "B": "bird", "C": "cat", "D": "fish"}


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("abc", ["ABC "], 1.0),
        ("ab", ["abcd"], 0.5),  # exactly one half stays
        ("a", ["abc"], 0.0),  # below it nothing does
        ("abcx", ["abcd", "zzzz"], 0.75),
        ("a  b", ["a b"], 1.0),
        ("a  x", ["a b"], 1 - 1 / 4),  # the length is that before blanks are collapsed
        ("ßb", ["ßa"], 1 - 1 / 3),  # and after upper(), where ß is two letters
        ("ab", ["ac   "], 1 - 1 / 5),
        ("", [""], 1.0),
    ],
)
def test_anls(prediction, references, expected):
    assert score("anls", prediction, references) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("0", "0", 1), ("0.0", "0", 0), ("1,000", "1000", 0), ("$5", "5", 0), ("five", "5", 0), ("Yes.", "Yes", 0),
        ("yes", "Yes", 1), ("1e3", "1000", 1), ("1_000", "1000", 1), ("5.", "5", 1), ("5%", "5", 0), ("5%", "0.05", 1),
        ("2008", "2010", 1), ("105", "100", 1), ("105.1", "100", 0), ("-95", "-100", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction, target, expected):
    assert score("relaxed_accuracy", prediction, [target]) == expected


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        ("5", "5", 0),  # no "Answer:"
        ("Answer: 5", "5", 1), ("Final Answer: $1,000.", "1000", 1), ("answer: 0.0", "0", 1),
        ("**Answer:** 5%", "5", 1),
        ("Answer: 5%", "0.05", 1), ("Answer: 0.05", "5%", 1), ("Answer: Bird", "b", 1), ("Answer: Yes.", "yes", 1),
        ("Answer: 4\nAnswer:\n\n [7]", "7", 1), ("Answer:", "5", 0), ("Answer: 2008", "2010", 1),
    ],
)  # fmt: skip
def test_relaxed_accuracy_of_lm_eval(prediction, target, expected):
    assert score("relaxed_accuracy_lm_eval", prediction, [target]) == expected


@pytest.mark.parametrize(
    ("text", "vlmevalkit", "lmms"),
    [
        ("Yes.", "Yes", "yes"), ("no, it is", "No", "no"), ("yes and no", "Unknown", "yes"),
        ("Not sure", "Unknown", "no"),
        ("None", "Unknown", "no"), ("I know", "Unknown", "other"), ("know", "Unknown", "no"), ("y", "Unknown", "yes"),
        ("N.", "Unknown", "no"), ("well, yes", "Yes", "other"), ("", "Unknown", "other"),
    ],
)  # fmt: skip
def test_yes_and_no(text, vlmevalkit, lmms):
    assert score("yesno_vlmevalkit", text) == vlmevalkit
    assert score("yesno_mme_lmms", text) == lmms


def test_pope():
    answers, labels = ["Yes.", "no", "maybe", "yes", "There is not. yes"], ["yes", "yes", "yes", "no", "no"]
    official = score("pope_official", answers, labels)  # yes no yes yes no
    assert official["accuracy"] == 3 / 5 and official["precision"] == 2 / 3 and official["recall"] == 2 / 3
    assert official["yes_ratio"] == 3 / 5
    kit = score("pope_vlmevalkit", answers, labels)  # yes no ? yes yes: what cannot be read is a miss
    assert kit["precision"] == 1 / 3 and kit["recall"] == 1 / 3 and kit["accuracy"] == 1 / 5
    lmms = score("pope_lmms", answers, labels)  # ? no ? yes ?: only a literal no is a miss
    assert lmms["recall"] == 0 and lmms["accuracy"] == 0 and lmms["yes_ratio"] == 3 / 5  # the labels' ratio
    assert score("pope_lmms", ["yes", "?"], ["yes", "yes"])["recall"] == 1
    assert score("pope_vlmevalkit", ["yes", "?"], ["yes", "yes"])["recall"] == 1 / 2
    assert score("pope_official", ["no"], ["no"])["f1"] == 0  # no division by zero


def mme(category, *answers):
    return [
        {"category": category, "image": f"{category}-{n // 2}", "answer": answer} for n, answer in enumerate(answers)
    ]


def test_mme():
    references = mme("color", "yes", "no", "yes", "no")
    assert score("mme_vlmevalkit", ["Yes", "No", "yes", "yes"], references)["color"] == 75 + 50
    assert score("mme_vlmevalkit", ["Yes", "None", "yes", "know"], references)["color"] == 50
    assert score("mme_lmms", ["Yes", "None", "yes", "know"], references)["color"] == 200
    every = [item for category in PERCEPTION + COGNITION for item in mme(category, "yes", "no")]
    points = score("mme_vlmevalkit", ["yes", "no"] * 14, every)
    assert points["perception"] == 2000 and points["cognition"] == 800
    assert score("mme_vlmevalkit", ["yes", "no"], mme("OCR", "yes", "no"))["perception"] is None
    three = [{"category": "color", "image": 1, "answer": "yes"}] * 3
    assert score("mme_vlmevalkit", ["yes"] * 3, three)["color"] == 200
    with pytest.raises(InputError, match="3 questions"):
        score("mme_lmms", ["yes"] * 3, three)


@pytest.mark.parametrize(
    ("answer", "vlmevalkit", "lmms"),
    [
        ("B", "B", "B"), ("(B)", "B", "B"), ("b", None, None), ("A dog", "A", "A"), ("A or B", None, "A"),
        ("B is right because it has two wings and flies", None, "B"), ("bird", "B", None), ("BIRD", "B", "D"),
        ("a bird and a cat", None, None), ("Cannot determine the answer", "Z", "C"), ("Z", "Z", None),
        ("The correct answer is **C** and it is not the first one of all those that were given", "C", "C"),
        ("Answer: B", "B", "B"), ("The answer is C.", "C", "C"), ("", None, None),
        ("I see a long story about many things that ends with no more than a bird in the sky", None, None),
    ],
)  # fmt: skip
def test_multiple_choice(answer, vlmevalkit, lmms):
    options = dict(ABCD)
    assert score("mcq_vlmevalkit", answer, [options]) == vlmevalkit
    assert score("mcq_lmms", answer, [options]) == lmms
    assert options == ABCD


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        ("(B)", ABCD, "B"), ("B", ABCD, "B"), ("A or C", ABCD, "C"), ("(A) or (B)", ABCD, "B"), ("B. bird", ABCD, "B"),
        ("B) 10 cm", {"A": "5 cm", "B": "10 cm"}, None),  # the official code draws an option
        ("b", ABCD, None), ("it is surely a kind of fish", ABCD, "D"), ("a fish", ABCD, None),
        ("we think that it is 15 cm long", {"A": "5 cm", "B": "10 cm"}, "A"),  # "15 cm" contains "5 cm"
    ],
)  # fmt: skip
def test_mmmu_choices(answer, options, expected):
    assert {score("mmmu_mcq", answer, [options]) for _ in range(8)} == {expected}


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The answer is 3.14159", "3.14", 1), ("x = 1,000", "1000", 1), ("so it is about 24", "24", 1),
        ("24.5", "24", 0), ("It is the left ventricle.", "left ventricle", 1), ("the right one", "left", 0),
    ],
)  # fmt: skip
def test_mmmu_open_questions(answer, reference, expected):
    assert score("mmmu_open", answer, [reference]) == expected


@pytest.mark.parametrize(
    ("answer", "science", "diagram"),
    [("B", 1, 1), ("b", 1, 1), ("B.", 1, 1), ("B. bird", 1, 1), ("(B)", 0, 1), ("The answer is B", 0, 0),
     ("Answer: B", 0, 0), ("b. bird", 0, 0), ("bird", 0, 0), ("A", 0, 0)],
)  # fmt: skip
def test_scienceqa_and_ai2d(answer, science, diagram):
    texts = list(ABCD.values())
    assert score("scienceqa", answer, [{"choices": texts, "answer": 1}]) == science
    assert score("ai2d", answer, [{"options": texts, "answer": "1"}]) == diagram
    assert score("ai2d", answer, [{"options": texts, "answer": "B"}]) == diagram


def test_circular():
    assert score("mmbench_circular", [["A", "B"], ["A", None]], [["A", "B"], ["A", "D"]]) == 0.5
    assert score("mmbench_circular", [[True, True, True], [True, False]]) == 0.5


def test_mmstar():
    groups = ["a", "a", "a", "b"]
    assert score("mmstar_average", [1, 1, 1, 0], groups) == 0.75
    assert score("mmstar_average", [1, 1, 1, 0], groups, flavor="lmms") == 0.5
    assert score("mmstar_average", [1, 0], [{"l2_category": "a"}, {"l2_category": "b"}], flavor="lmms") == 0.5


def test_ocrbench():
    assert score("ocrbench", "It says HELLO\nWorld.", ["hello world"]) == 1
    assert score("ocrbench", "", ["a"]) == 0  # an answer that is saved as "nan" would contain an a
    assert score("ocrbench", "X ^ 2", ["x^2"]) == 0
    assert score("ocrbench", "x ^ 2 + 1", ["x^2"], hme=True) == 1
    assert score("ocrbench", "X^2", ["x^2"], hme=True) == 0
    assert score("ocrbench", "ＡＢＣ", ["abc"]) == 0
    assert score("ocrbench", "ＡＢＣ", ["abc"], flavor="lmms") == 1


def test_hallusionbench():
    def item(figure, question, answer):
        return {"subcategory": "s", "set_id": "0", "figure_id": figure, "question_id": question, "gt_answer": answer}

    references = [item("0", "0", "1"), item("0", "1", "0"), item("1", "0", "1"), item("1", "1", "0")]
    found = score("hallusionbench", ["yes", "no", "Yes.", "I cannot tell"], references)
    assert found == {"aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5}


def test_mathvista():
    number = {"question_type": "free_form", "answer_type": "float", "precision": 1.0, "answer": "0.6", "choices": None}
    assert score("mathvista_normalize", "0.64", [number]) == "0.6"
    assert score("mathvista_normalize", "much", [number]) is None
    assert score("mathvista_rule", "0.64", [number], flavor="lmms") == 1
    assert score("mathvista_rule", "0.64", [number]) is None  # VLMEvalKit asks the judge
    assert score("mathvista_rule", "0.6", [number]) == 1
    choices = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"], "answer": "8/11"}
    assert score("mathvista_rule", "(B) 8/11", [choices]) == 1
    assert score("mathvista_rule", "(B) 8/11", [choices], flavor="lmms") is None
    assert score("mathvista_rule", "8/11", [choices], flavor="lmms") == 1
    assert score("mathvista_normalize", "(a)", [choices]) == "3/11"
    assert score("mathvista_normalize", "8/12", [choices]) == "8/11"  # the nearest
    whole = number | {"answer_type": "integer", "answer": "14"}
    assert score("mathvista_normalize", "14.7", [whole]) == "14"
    assert score("mathvista_rule", "14", [whole]) == 1 and score("mathvista_rule", "It is 14", [whole]) is None


def test_nothing_to_score_is_an_error():
    for name in NAMES:
        if not name.startswith("yesno"):
            with pytest.raises(InputError):
                score(name, [] if name in ("mmbench_circular", "mmstar_average") else ["yes"], [])
    with pytest.raises(InputError, match="1 answers, but 2"):
        score("pope_official", ["yes"], ["yes", "no"])
    with pytest.raises(InputError, match="flavor"):
        score("mmstar_average", [1], ["a"], flavor="lms")


def test_documents_are_left_as_they_are():
    references = [{"category": "color", "image": 1, "answer": "yes"}, {"category": "color", "image": 1, "answer": "no"}]
    before = copy.deepcopy(references)
    score("mme_lmms", ["yes", "no"], references)
    assert references == before
