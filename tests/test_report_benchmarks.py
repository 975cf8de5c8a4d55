"""The report's cards for the shipped benchmarks, in their own columns: options, many pictures, missing answers."""

import json
import re

import pytest

from tests import benchmark_rows as benchmarks
from tests.evaluation.test_benchmarks import right_lines
from vlm_taid.evaluation import Results, compare
from vlm_taid.evaluation.gallery import gallery
from vlm_taid.evaluation.readers import Row
from vlm_taid.evaluation.results import sample_line
from vlm_taid.evaluation.tasks import shipped_tasks
from vlm_taid.report import report


def saved(folder, name, answers_by_task, files, broken=()):
    """Results of a model on several benchmarks; ``broken``: (task, row) that it could not answer."""
    tasks, samples = {}, {}
    for benchmark, answers in answers_by_task.items():
        tasks[benchmark], samples[benchmark] = right_lines(benchmark, files[benchmark][0], answers)
        for row in [row for one, row in broken if one == benchmark]:
            samples[benchmark][row] = sample_line(Row.failed(row, "the picture is damaged"), "", tasks[benchmark])
    results = Results.of(
        tasks,
        samples,
        {task: len(lines) for task, lines in samples.items()},
        model_name=name,
        config={"num_params": 1_000_000},
        chat_template=None,
        run={"date": "2026-01-01"},
    )
    return results.save(folder).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return {name: benchmarks.write(name, folder) for name in shipped_tasks()}


@pytest.fixture(scope="module")
def evaluations(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    right = {name: answers for name, (_, answers) in files.items()}
    wrong = {name: ["no never", *answers[1:]] for name, answers in right.items()}
    broken = [("ocrbench", 1)], [("mmmu_val", 1)]  # rows with questions of their own
    return [
        saved(folder, name, answers, files, rows)
        for name, answers, rows in zip(("teacher", "student"), (right, wrong), broken, strict=True)
    ]


@pytest.mark.parametrize("name", sorted(shipped_tasks()))
def test_every_benchmark_has_cards(name, evaluations, files):
    shown = gallery(compare(evaluations), name)
    assert shown.rows == len(files[name][1])
    first = next(card for card in shown.cards if card.row.index == 0)
    assert [answer.shown for answer in first.answers] == [files[name][1][0], "no never"] and first.differs
    assert first.answers[0].verdict == ("open" if name == "mmvet" else "right")
    assert first.answers[1].verdict == ("open" if name in ("mmvet", "mathvista") else "wrong")
    assert first.row.images and first.question and first.references


def test_options_pictures_and_missing_answers(evaluations, tmp_path):
    text = report([], tmp_path / "report.html", evaluations).read_text()
    opened = json.loads(re.search(r'<script type="application/json" id="cards">(.*?)</script>', text)[1])
    cards = re.findall(r'<button type="button" class="card".*?</button>', text, re.DOTALL)
    assert len(cards) == len(opened)
    for card, about in zip(cards, opened, strict=True):
        assert all(
            f"<span>{option}</span>" in card.replace("&lt;", "<").replace("&gt;", ">") for option in about["options"]
        )
    kit = next(about for about in opened if about["options"] == ["A. dog", "B. bird", "C. cat", "D. fish"])
    assert kit["references"] == ["B. bird"]
    two = next(card for card in cards if "<image 2>" in card.replace("&lt;", "<").replace("&gt;", ">"))
    assert two.count("<img") == 3 and "Picture 3 of 3" in two and 'class="pictures several"' in two
    assert text.count("no answer: the picture is damaged") == 2 * 2  # in the card and in what it opens
    assert "– no answer or no score yet" in text


def test_agreement_is_over_rows_that_both_answered(evaluations):
    comparison = compare(evaluations)
    names = [comparison.reference, next(label for label in comparison.plain if label != comparison.reference)]
    found = comparison.agreement_with_reference(names[1], "ocrbench")
    assert found is not None and (found.value, found.count) == (0.0, 1)
    assert comparison.agreement_with_reference(names[0], "ocrbench") is None


def test_moved_files_are_named_by_task(evaluations, files, tmp_path):
    moved = {}
    for name in ("chartqa", "mmbench_en_v11"):
        moved[name], _ = benchmarks.write(name, tmp_path)
    comparison = compare(evaluations)
    for name, path in moved.items():
        shown = gallery(comparison, name, data=path)
        assert shown.cards[0].row.row.startswith(path)
    data = ",".join(f"{name}={path}" for name, path in moved.items())
    assert report([], tmp_path / "report.html", evaluations, data=data).is_file()
