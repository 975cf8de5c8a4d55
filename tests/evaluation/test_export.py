"""Answers in VLMEvalKit's columns, read back as it reads them: with pandas, and what is missing as "nan"."""

import ast
import importlib.util
import json

import pandas
import pytest

from tests import benchmark_rows as benchmarks
from tests.evaluation.test_benchmarks import right_lines
from vlm_taid.cli import main
from vlm_taid.evaluation.results import json_line
from vlm_taid.evaluation.saved import score_command

KINDS = [
    ".tsv",
    pytest.param(
        ".xlsx",
        marks=pytest.mark.skipif(importlib.util.find_spec("openpyxl") is None, reason="needs pip install openpyxl"),
    ),
]


def exported(name, answers, folder, kind=".tsv", change=lambda lines: lines):
    """The benchmark's rows with these answers, written by the command and read as VLMEvalKit's ``load`` reads them."""
    _, lines = right_lines(name, benchmarks.write(name, folder)[0], answers)
    samples, output = folder / "samples.jsonl", folder / "kit" / f"mine_X{kind}"
    samples.write_text("".join(json_line(line) + "\n" for line in change(lines)))
    assert main(["eval", "export", "--samples", str(samples), "--output", str(output)]) == 0
    return output, pandas.read_csv(output, sep="\t") if kind == ".tsv" else pandas.read_excel(output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["", "nan", "None", "NA", "=1+1", 'a "b"\tc\nd', "It's red.", "ＡＢＣ"])
def test_every_answer_comes_back(answer, kind, tmp_path):
    _, table = exported("mmvet", [answer, "a red square"], tmp_path, kind)
    assert str(table["prediction"][0]).strip() == answer and table["prediction"][1] == "a red square"
    assert isinstance(table["prediction"][0], str)  # VLMEvalKit joins it with other texts


def test_columns_of_the_kits_own_rows(tmp_path):
    path, table = exported("mmbench_en_v11", ["B", "B. bird", "C"], tmp_path)
    assert list(table)[:9] == ["index", "question", "A", "B", "C", "D", "answer", "category", "l2-category"]
    assert list(table)[-1] == "prediction" and {"split", "hint"} <= set(table) and "image" not in set(table)
    assert table["index"].tolist() == [0, 1, 1_000_000] and table["answer"].tolist() == ["B", "B", "C"]
    assert score_command(str(path), task="mmbench_en_v11").value == 1.0
    path, _ = exported("mmbench_en_v11", ["B", "", "C"], tmp_path)
    assert score_command(str(path), task="mmbench_en_v11").value == 0.5


def test_columns_of_judged_benchmarks(tmp_path):
    """What VLMEvalKit's MMVet and MathVista read, from the hub's columns."""
    _, table = exported("mmvet", ["a", "b"], tmp_path)
    assert table[["index", "answer", "category"]].values.tolist() == [
        ["v1_0", "red<AND>square", "rec"], ["v1_1", "red<AND>square", "rec"]
    ]  # fmt: skip

    def with_metadata(lines):
        return [line | {"doc": line["doc"] | {"metadata": {"task": "t", "skills": ["s"]}}} for line in lines]

    _, table = exported("mathvista", ["(B) 8/11", "14"], tmp_path, change=with_metadata)
    first = table.iloc[0]
    assert ast.literal_eval(first["choices"]) == ["3/11", "8/11"] and ast.literal_eval(first["skills"]) == ["s"]
    assert (first["answer_option"], first["answer"], first["task"]) == ("B", "8/11", "t")
    assert first["question"].startswith("Hint: give a letter.") and first["question_type"] == "multi_choice"


def test_several_references_and_no_name_for_rows(tmp_path):
    _, table = exported("docvqa", ["red", "x"], tmp_path)
    assert ast.literal_eval(table["answer"][0]) == ["red", "dark red"] and table["index"].tolist() == [0, 1]
    _, table = exported("infovqa", ["12%", "x"], tmp_path)  # both rows are called 1
    assert table["index"].tolist() == [0, 1] and table["questionId"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("change", "output", "message"),
    [
        ({"error": "no picture"}, "x.tsv", "samples.jsonl:1: the row has no answer (no picture)"),
        ({}, "x.json", "VLMEvalKit reads .tsv and .xlsx"),
        (None, "x.tsv", "is it a samples file?"),
    ],
)
def test_what_is_refused(change, output, message, tmp_path, capsys):
    _, lines = right_lines("mmvet", benchmarks.write("mmvet", tmp_path)[0], ["a", "b"])
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"a": 1} if change is None else lines[0] | change) + "\n")
    assert main(["eval", "export", "--samples", str(samples), "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / output).exists()
