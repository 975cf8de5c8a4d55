"""The page shows what runs and evaluations say, in one small file, and refuses what it cannot read."""

import json
import re

import pytest
from PIL import Image

from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Results, Task, save_grid
from vlm_taid.evaluation.readers import Row, image_sha256
from vlm_taid.evaluation.results import sample_line
from vlm_taid.report import MAX_BYTES, MAX_POINTS, Run, report

COLORS = ["red", "green", "blue", "teal", "gray", "black"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
    rows = [{"image": f"{color}.png", "question": f"is <b> {color}?", "answer": color} for color in COLORS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(questions, name, answers):
    """Results of a model that answered the six rows so, written to a folder."""
    task = Task("colors", SourceOptions(path=str(questions), format="vqa"), metric="exact_match")
    lines = []
    for index, (color, answer) in enumerate(zip(COLORS, answers, strict=True)):
        picture = image_sha256(Image.new("RGB", (8, 8), color))
        row = Row(index, {"question": f"is <b> {color}?", "image": [picture]}, [color], None, "prompt", [])
        lines.append(sample_line(row, answer, task))
    results = Results.of(
        {"colors": task},
        {"colors": lines},
        {"colors": 6},
        model_name=name,
        config={"num_params": 1_000_000},
        chat_template=None,
        run={"date": "2026-01-01"},
    )
    return results.save(questions.parent / "results").parent


@pytest.fixture
def evaluations(questions):
    teacher = evaluation(questions, "teacher", COLORS)
    student = evaluation(questions, "student", ["red", "<i>", "blue", "", "gray", "black"])
    return [teacher, student]


def run_folder(path, *, taid=True, steps=20):
    path.mkdir()
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            row = {
                "step": step,
                "epoch": step / 10,
                "loss": 2 / step,
                "kl": 1 / step,
                "answer_tokens_per_second": 100.0,
                "peak_memory_gib": 0.5,
            }
            if taid:
                row |= {"t": 0.4 + step / 100, "t_closed_form": 0.4 + step / 200}
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": steps, "eval_loss": 1.0}) + "\n")
    (path / "recipe.yaml").write_text(f"objective:\n  name: {'taid' if taid else 'sft'}\nnote: a < b\n")
    return path


def test_page(tmp_path, evaluations):
    runs = [run_folder(tmp_path / "with_taid"), run_folder(tmp_path / "with_sft", taid=False)]
    page = report(runs, tmp_path / "out" / "report.html", evaluations, title="A & B")
    text = page.read_text()
    assert page.stat().st_size < MAX_BYTES
    assert "<title>A &amp; B</title>" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert text.count("<script") == 2 and not re.search(r"<script[^>]* src", text)
    assert "prefers-color-scheme: dark" in text
    for expected in ("with_taid", "with_sft", "taid, closed form", "agrees with teacher", "66.7 ± 21.1", "a &lt; b"):
        assert expected in text, expected
    assert text.count("<figure>") == 6 and text.count('<figure class="alone">') == 1
    assert "Peak memory: with_taid from 0.5 at step 1 to 0.5 at step 20" in text
    assert "Agreement: student, colors: 66.7 ± 21.1 %" in text
    cards = re.findall(r'<button type="button" class="card".*?</button>', text)
    assert len(cards) == 6
    differing = ["✗" in card for card in cards]
    assert differing == [True, True, False, False, False, False]
    assert "✗ student: &lt;i&gt;" in text and "✗ student: (empty)" in text and "is &lt;b&gt; red?" in text
    assert '<span class="right">✓ teacher: green</span>' in text


def test_equal_pages_are_equal(tmp_path, evaluations):
    runs = [run_folder(tmp_path / "a")]
    pages = [report(runs, tmp_path / f"{n}.html", evaluations).read_text() for n in range(2)]
    assert pages[0] == pages[1]


def test_runs_alone_and_evaluations_alone(tmp_path, evaluations):
    text = report([run_folder(tmp_path / "sft", taid=False)], tmp_path / "runs.html").read_text()
    assert "closed form" not in text and 'class="card"' not in text and "<script" not in text
    text = report([], tmp_path / "scores.html", [evaluations[1]]).read_text()
    assert "on 2 of 6 rows the answer is wrong" in text
    assert "<figure>" not in text


def test_the_reference_can_be_named(tmp_path, evaluations):
    text = report([], tmp_path / "r.html", [f"S={evaluations[1]}", f"T={evaluations[0]}"], reference="T").read_text()
    assert "agrees with T" in text


def test_a_resumed_run_counts_each_step_once(tmp_path):
    folder = run_folder(tmp_path / "run", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "loss": 9.0}) + "\n" + json.dumps({"step": 6, "loss": float("nan")}) + "\n")
    steps, values = Run.read(folder).curve("loss")
    assert steps == [1, 2, 3, 4, 5] and values[3] == 9.0


def test_long_curves_are_averaged(tmp_path):
    steps, values = Run.read(run_folder(tmp_path / "run", steps=5000)).curve("t")
    assert len(steps) <= MAX_POINTS
    assert steps[0] == 5.0 and values[0] == pytest.approx(0.45)  # the mean of steps 1 to 9


def test_grid(tmp_path, evaluations):
    path = save_grid(evaluations, tmp_path / "grid.png", count=5, columns=3)
    with Image.open(path) as image:
        assert image.width > image.height > 200


def test_moved_and_changed_pictures(tmp_path, evaluations, questions):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in [questions, *tmp_path.glob("*.png")]:
        file.rename(moved / file.name)
    with pytest.raises(InputError, match="questions"):
        report([], tmp_path / "r.html", evaluations)
    report([], tmp_path / "r.html", evaluations, data=moved / "questions.jsonl")
    Image.new("RGB", (8, 8), "pink").save(moved / "green.png")
    with pytest.raises(InputError, match="not the picture"):
        report([], tmp_path / "r.html", evaluations, data=moved / "questions.jsonl")


def test_scores_of_evaluations_during_a_run_are_curves(tmp_path):
    folder = run_folder(tmp_path / "run")
    lines = [{"step": step, "eval_loss": 1 / step, "eval_vqa": step / 20, "eval_runtime": 3.0} for step in (10, 20)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    assert Run.read(folder).curve("eval_vqa") == ([10, 20], [0.5, 1.0]) and Run.read(folder).scores == ["eval_vqa"]
    text = report([folder], tmp_path / "runs.html").read_text()
    assert "Held-out loss: run from 0.1 at step 10 to 0.05 at step 20" in text
    assert "vqa: run from 0.5 at step 10 to 1 at step 20" in text and "runtime" not in text


def test_refusals(tmp_path, evaluations):
    with pytest.raises(InputError, match="nothing to report"):
        report([], tmp_path / "r.html")
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        report([tmp_path], tmp_path / "r.html")
    with pytest.raises(InputError, match="label of the evaluations: teacher, student"):
        report([], tmp_path / "r.html", evaluations, models=["other=somewhere"])
    with pytest.raises(InputError, match=r"models student=.*nowhere"):
        report([], tmp_path / "r.html", evaluations, models=[f"student={tmp_path / 'nowhere'}"])
    broken = run_folder(tmp_path / "broken")
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:22"):
        report([broken], tmp_path / "r.html")
    for file in evaluations[0].glob("samples_*"):
        file.unlink()
    with pytest.raises(InputError, match="no samples"):
        report([], tmp_path / "r.html", evaluations)
