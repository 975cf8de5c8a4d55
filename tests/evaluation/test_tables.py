"""`eval compare`: the table of models, and paired differences."""

import csv
import math
from fractions import Fraction

import pytest

from tests.evaluation.test_results import make
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.evaluation import compare_command
from vlm_taid.evaluation.measures import Measure, difference


def test_paired_difference():
    a, b = make(["yes", "yes", "no", "no"], name="a"), make(["yes", "no", "yes", "yes"], name="b")
    found = difference(a, b, Measure("colors", "exact_match", main=True), ("a", "b"))
    same = difference(a, a, Measure("colors", "exact_match", main=True), ("a", "a"))
    assert found is not None and same is not None
    differences = [0, -1, 1, 1]
    mean = Fraction(sum(differences), 4)
    variance = sum((value - mean) ** 2 for value in differences) / 3
    assert found.score.value == pytest.approx(float(mean))
    assert found.score.stderr == pytest.approx(math.sqrt(variance / 4))
    assert (found.better_a, found.better_b) == (1, 2)
    assert same.score.stderr == 0


@pytest.fixture
def saved(tmp_path):
    make(["yes"] * 6, name="teacher").save(tmp_path / "teacher")
    make(["yes", "no"] * 3, name="student").save(tmp_path / "student")
    make(["yes"] * 5, name="short").save(tmp_path / "short")
    return tmp_path


def test_markdown(saved, capsys):
    text = compare_command([f"big={saved / 'teacher'}", str(saved / "student")], output=str(saved / "out" / "table.md"))
    assert "| model | colors |" in text and "| big | 100.0 ± 0.0 |" in text and "| student | 50.0 ± 22.4 |" in text
    assert "| student | colors | 6 | -50.0 ± 22.4 | 3 | 0 | 0.25 |" in text  # 2 / 2**3
    assert (saved / "out" / "table.md").read_text().strip() == text.strip() == capsys.readouterr().out.strip()


def test_csv_and_latex(saved):
    paths = [str(saved / "teacher"), str(saved / "student")]
    rows = list(csv.reader(compare_command(paths, "csv").splitlines()))
    assert rows[:3] == [["model", "colors", "colors stderr"], ["teacher", "100.0", "0.0"], ["student", "50.0", "22.4"]]
    text = compare_command(paths, "latex")
    assert r"student & $50.0_{\pm 22.4}$ \\" in text and text.count(r"\begin{tabular}") == 2


def test_command_line(saved, capsys):
    assert main(["eval", "compare", f"t={saved / 'teacher'}", str(saved / "student"), "--reference", "student"]) == 0
    assert "| t | colors | 6 | +50.0 ± 22.4 | 0 | 3 | 0.25 |" in capsys.readouterr().out
    assert main(["eval", "compare", str(saved / "gone")]) == 2
    assert main(["eval", "compare"]) == 2
    assert main(["eval", "compare", str(saved / "teacher"), "--format", "html"]) == 2


def test_other_questions_are_refused(saved):
    with pytest.raises(InputError, match="did not answer the same questions"):
        compare_command([str(saved / "teacher"), str(saved / "short")])
