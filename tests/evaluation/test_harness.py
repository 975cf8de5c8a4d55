"""Tasks of lm-eval through the command; skipped where lm-eval is not installed."""

import json
import math
from pathlib import Path

import datasets
import pytest

from tests import squares
from tests.evaluation.test_language import DOCUMENTS, TEXTS
from vlm_taid.cli import main
from vlm_taid.evaluation import Results

ROLLING = """task: texts
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity}
"""
SQUARES = """task: NAME
dataset_path: parquet
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: generate_until
doc_to_image: [image]
doc_to_text: "<image>{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 8, do_sample: false}
filter_list:
  - {name: none, filter: [{function: remove_whitespace}, {function: take_first}]}
metric_list:
  - {metric: exact_match}
"""


def written(folder, task):
    """The results file and a task's samples, as lm-eval left them."""
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob(f"samples_{task}_*.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def test_without_lm_eval_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.__main__", None)
    assert main(["eval", "lm", "--model", str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert "pip install 'vlm-taid[lm-eval]'" in capsys.readouterr().err


def test_what_does_not_go_together(capsys):
    for words, message in (
        ([], "one of the two"),
        (["--data", "a=b", "--tasks", "c"], "one of the two"),
        (["--tasks", "c", "--teacher", "d"], "with --data alone"),
        (["--data", "a=b", "--", "--seed", "1"], "--seed stands after --"),
        (["--data", "a=b", "--model_args", "dtyp=x"], "--model_args: unknown key 'dtyp'"),
    ):
        assert main(["eval", "lm", "--model", "m", *words]) == 2
        assert message in capsys.readouterr().err


def test_perplexity_of_lm_eval_is_ours(language_model, tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install 'vlm-taid[lm-eval]'")
    model, tokenizer = language_model
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "texts.yaml").write_text(ROLLING.replace("DATA", str(data)))
    command = ["eval", "lm", "--model", str(tmp_path / "model"), "--output_path"]
    flags = ["--include_path", str(tmp_path / "tasks"), "--model_args", "add_bos_token=false"]
    assert main([*command, str(tmp_path / "theirs"), "--tasks", "texts", "--", *flags]) == 0
    assert main([*command, str(tmp_path / "ours"), "--data", f"texts={data}"]) == 0
    theirs, samples = written(tmp_path / "theirs", "texts")
    ours = Results.load(tmp_path / "ours").data["results"]["texts"]
    assert ours["byte_perplexity,none"] == pytest.approx(theirs["results"]["texts"]["byte_perplexity,none"], rel=1e-5)
    assert len(samples) == len(DOCUMENTS) and math.isfinite(ours["byte_perplexity,none"])
    assert main([*command, str(tmp_path / "none"), "--tasks", "no_such_task", "--", *flags]) == 2


def test_coloured_squares_score_one_through_hf_multimodal(tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install 'vlm-taid[lm-eval]'")
    model, data = squares.fitted(tmp_path / "squares")
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [row | {"image": str(Path(data).with_name(row["image"]))} for row in rows]
    wrong = [row | ({"answer": "purple"} if number == 5 else {}) for number, row in enumerate(rows)]
    for name, some in (("squares", rows), ("one_is_wrong", wrong)):
        pictures = datasets.Dataset.from_list(some).cast_column("image", datasets.Image())
        pictures.to_parquet(tmp_path / f"{name}.parquet")
        task = SQUARES.replace("NAME", name).replace("DATA", str(tmp_path / f"{name}.parquet"))
        (tmp_path / f"{name}.yaml").write_text(task)
    command = ["eval", "lm", "--model", model, "--tasks", "squares,one_is_wrong", "--batch_size", "4"]
    command += ["--output_path", str(tmp_path / "out"), "--", "--include_path", str(tmp_path), "--apply_chat_template"]
    assert main(command) == 0
    results, samples = written(tmp_path / "out", "squares")
    assert results["results"]["squares"]["exact_match,none"] == 1.0 and len(samples) == 12
    assert results["results"]["one_is_wrong"]["exact_match,none"] == pytest.approx(11 / 12)
