"""What an evaluation keeps to: each rule that results are trusted by."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from tests import families
from vlm_taid.cli import main
from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Results, Task, evaluate, load, run_command, score_command
from vlm_taid.evaluation import command as commands
from vlm_taid.evaluation.results import folder_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Twelve rows with questions of different lengths and pictures of different sizes."""
    folder = tmp_path_factory.mktemp("rows")
    path = families.vqa_rows(folder, rows=12)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for number, line in enumerate(lines):
        line["question"] = "what color is the square" + " yes no" * (number * 5 % 7) + "?"
        line["category"] = "ab"[number % 2]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


def task(path, **options):
    return Task("rows", SourceOptions(str(path), "vqa"), max_new_tokens=6, **options)


def answers(results):
    return [line["filtered_resps"][0] for line in results.samples["rows"]]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm", "internvl"])
def test_answers_are_equal_for_every_batch_size(family, rows):
    """Rule 1, on models whose weights are spread so that answers differ; the processor pads on the wrong side."""
    model, processor = load(families.made(family))
    processor.tokenizer.padding_side = "right"
    found = {
        size: answers(evaluate(model, processor, [task(rows)], batch_size=size, num_workers=0, progress=False))
        for size in (1, 4, 12)
    }
    assert len(set(found[1])) > 3  # else nothing would be seen
    assert found[1] == found[4] == found[12]


@pytest.fixture(scope="module")
def model_folder():
    return families.made("llava")


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


def run(model, path, **options):
    return evaluate(*model, [task(path)], **{"num_workers": 0, "progress": False, "model_name": "tiny", **options})


def test_scoring_draws_nothing_at_random(model, rows):
    """Rule 2: the state of every generator is what it was."""
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    results = run(model, rows)
    score_lines = [line["parsed"] for line in results.samples["rows"]]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert results.data["results"]["rows"]["n_unparsed"] == sum(parsed is None for parsed in score_lines)


BAD = {"missing image": {"image": "gone.png"}, "no reference": {"answer": ""}, "no question": {"question": None}}


@pytest.mark.parametrize("bad", BAD)
def test_errors_stop_or_are_counted(bad, model, model_folder, rows, tmp_path, capfd):
    """Rule 3: non-zero exit with a clear sentence, or n_errors and a score of the others."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[2] |= BAD[bad]
    path = rows.with_name(f"{bad.replace(' ', '_')}.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", "run", "--model", model_folder, "--data", f"rows={path}", "--num_workers", "0"]
    command += ["--metric", "exact_match", "--max_new_tokens", "6", "--output_path", str(tmp_path)]
    assert main(command) == 2
    assert f"{path}:3: " in capfd.readouterr().err
    assert not list(tmp_path.rglob("results_*.json"))
    assert main([*command, "--on-error", "record"]) == 0
    results = Results.load(tmp_path)
    counts = results.data["results"]["rows"]
    assert counts["n_errors"] == 1 and counts["sample_len"] == 11
    assert results.data["n-samples"]["rows"] == {"original": 12, "effective": 11}
    assert "1 rows with errors are not in the score" in results.markdown()
    assert f"{path}:3: " in results.samples["rows"][2]["error"]
    others = [answer for index, answer in enumerate(answers(results)) if index != 2]
    assert others == [a for index, a in enumerate(answers(run(model, rows, limit=None))) if index != 2]
    assert score_command(str(next(tmp_path.rglob("samples_*.jsonl")))) == results.score("rows")


def test_a_failing_model_stops_or_is_counted(model, rows):
    """Rule 3: a row that makes the model fail costs that row alone."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[3]["question"] += " quick lazy fox"
    path = rows.with_name("fails.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [set(model[1].tokenizer(line["question"])["input_ids"]) for line in lines]
    marked = min(ids[3] - set().union(*ids[:3], *ids[4:]))

    def fail(module, arguments, keywords):
        if (keywords["input_ids"] == marked).any():
            raise RuntimeError("CUDA out of memory, said the test")

    good = answers(run(model, path))
    handle = model[0].register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with pytest.raises(InputError, match=r"task rows, rows .*: the model failed: RuntimeError: .*batch_size"):
            run(model, path, batch_size=4)
        results = run(model, path, batch_size=4, on_error="record")
    finally:
        handle.remove()
    assert [line["doc_id"] for line in results.samples["rows"] if "error" in line] == [3]
    assert results.data["results"]["rows"]["n_errors"] == 1
    assert answers(results) == [*good[:3], "", *good[4:]]


def test_documents_stay_and_saved_answers_score_the_same(model, rows, tmp_path):
    """Rule 4."""
    results = run(model, rows)
    for sample, line in zip(results.samples["rows"], rows.read_text().splitlines(), strict=True):
        written = json.loads(line)
        assert {key: value for key, value in sample["doc"].items() if key != "image"} == {
            key: value for key, value in written.items() if key != "image"
        }
        assert re.fullmatch("[0-9a-f]{64}", sample["doc"]["image"][0])
    results.save(tmp_path)
    samples = next(tmp_path.rglob("samples_*.jsonl"))
    assert score_command(str(samples)) == results.score("rows")
    alone = tmp_path / "alone.jsonl"
    alone.write_text(samples.read_text())
    with pytest.raises(InputError, match="--metric"):
        score_command(str(alone))
    assert score_command(str(alone), "exact_match") == results.score("rows")


def test_scores_divide_by_what_was_scored(model, rows):
    """Rule 5."""
    results = run(model, rows, limit=5)
    assert results.data["n-samples"]["rows"] == {"original": 12, "effective": 5}
    values = [line["exact_match"] for line in results.samples["rows"]]
    assert results.score("rows").value == pytest.approx(sum(values) / 5) and "first 5 of 12 rows" in results.markdown()


def test_results_name_flavor_prompt_and_hashes(model, rows):
    """Rule 6."""
    results = run(model, rows)
    config = results.data["configs"]["rows"]
    assert (config["metric"], config["flavor"], config["prompt_style"]) == ("exact_match", "vlm_taid", "own")
    assert config["generation_kwargs"] == {"max_new_tokens": 6, "do_sample": False}
    for line in results.samples["rows"]:
        assert {len(line["doc_hash"]), len(line["prompt_hash"])} == {64}
    assert len({line["prompt_hash"] for line in results.samples["rows"]}) == 7  # as many as different questions


def test_files_have_the_harnesses_keys(model, rows):
    data = run(model, rows).data
    assert {"results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= set(
        data
    )
    assert {"model_name", "model_name_sanitized", "chat_template_sha", "git_hash", "run"} <= set(data)
    assert {"alias", "exact_match,none", "exact_match_stderr,none", "sample_len", "n_unparsed", "n_errors"} <= set(
        data["results"]["rows"]
    )
    assert data["higher_is_better"] == {"rows": {"exact_match": True}}
    wanted = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "parsed", "exact_match", "category"}
    assert wanted | {"doc_hash", "prompt_hash"} == set(run(model, rows, limit=1).samples["rows"][0])


class Killed(BaseException):
    """What ends a run in the test: not an Exception, as SIGINT is none."""


@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_continues(model, rows, tmp_path, torn):
    whole = run(model, rows, batch_size=2)
    calls = []

    def die(module, arguments, keywords):
        if keywords["input_ids"].shape[1] > 1:
            calls.append(keywords["input_ids"].shape[0])
            if len(calls) == 4:
                raise Killed

    handle = model[0].register_forward_pre_hook(die, with_kwargs=True)
    options = {"batch_size": 2, "output_path": tmp_path}
    with pytest.raises(Killed):
        run(model, rows, **options)
    handle.remove()
    journal = next(folder_of(tmp_path, "tiny").glob("unfinished_rows_rank0.jsonl"))
    assert len(journal.read_text().splitlines()) == 1 + 6
    if torn:  # the last line is half written
        journal.write_text(journal.read_text()[:-40])
    answered = []
    handle = model[0].register_forward_pre_hook(
        lambda module, arguments, keywords: answered.append(keywords["input_ids"].shape), with_kwargs=True
    )
    resumed = run(model, rows, resume=True, **options)
    handle.remove()
    asked = sum(shape[0] for shape in answered if shape[1] > 1)
    assert asked == (7 if torn else 6)
    assert resumed.samples == whole.samples and resumed.data["results"] == whole.data["results"]
    resumed.save(tmp_path)
    assert not list(tmp_path.rglob("unfinished_*"))


def test_only_the_same_run_is_continued(model, rows, tmp_path):
    first = run(model, rows, output_path=tmp_path)
    journal = next(tmp_path.rglob("unfinished_rows_rank0.jsonl"))
    text = journal.read_text()
    mark, *lines = text.splitlines()
    changed = [json.loads(line) | {"filtered_resps": ["from the journal"]} for line in lines]
    journal.write_text("\n".join([mark, *map(json.dumps, changed)]) + "\n")
    assert answers(run(model, rows, output_path=tmp_path, resume=True)) == ["from the journal"] * 12
    journal.write_text("\n".join(["0" * 64, *map(json.dumps, changed)]) + "\n")
    assert answers(run(model, rows, output_path=tmp_path, resume=True)) == answers(first)
    failed = json.loads(lines[0]) | {"filtered_resps": [""], "error": "a picture that is there now"}
    journal.write_text("\n".join([mark, json.dumps(failed), *map(json.dumps, changed[1:])]) + "\n")
    assert answers(run(model, rows, output_path=tmp_path, resume=True)).count("from the journal") == 11
    journal.write_text(text)
    parameter = next(model[0].parameters())
    with torch.no_grad():
        parameter.view(-1)[0] += 1.0
    run(model, rows, output_path=tmp_path, resume=True)
    with torch.no_grad():
        parameter.view(-1)[0] -= 1.0
    assert journal.read_text().splitlines()[0] != mark  # other weights are another run


def test_resume_needs_a_folder(capfd):
    assert main(["eval", "run", "--model", "nothing", "--data", "a=x", "--resume", "--batch-size=2"]) == 2
    assert "--resume needs" in capfd.readouterr().err  # a bare flag is true
    with pytest.raises(InputError, match="--resume needs"):
        run_command("nothing", data="a=x", resume=True)


def test_the_default_metric_goes_by_the_references(model, rows):
    ten = rows.with_name("ten.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    ten.write_text("".join(json.dumps(line | {"answers": [line["answer"]] * 10}) + "\n" for line in lines))
    assert task(rows).with_metric().metric == "exact_match" and task(ten).with_metric().metric == "vqa_accuracy"
    assert run(model, ten, limit=2).data["configs"]["rows"]["metric"] == "vqa_accuracy"


def test_no_task_is_found_by_a_wrong_name():
    with pytest.raises(InputError, match="did you mean textvqa"):
        commands.chosen_tasks("textvaq", {})
    with pytest.raises(InputError, match="nothing to run"):
        commands.chosen_tasks(None, {})
    with pytest.raises(InputError, match="no flavor lmms; it has none: give --metric"):
        commands.chosen_tasks("a", {"a": "x.jsonl"}, flavor="lmms")
