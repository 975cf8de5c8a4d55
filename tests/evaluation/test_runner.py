"""Answers depend on the question and its picture, and on nothing else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import families
from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Results, Task, evaluate, load, run_command
from vlm_taid.evaluation.command import chosen_tasks
from vlm_taid.evaluation.readers import PromptBatches, other_rows
from vlm_taid.evaluation.rows import Rows
from vlm_taid.pretrained import load_processor


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def task(path, **options):
    return Task(
        "colors", SourceOptions(path=str(path), format="vqa"), metric="exact_match", max_new_tokens=6, **options
    )


def run(model, path, **options):
    return evaluate(*model, [task(path)], progress=False, **{"num_workers": 0, "model_name": "tiny", **options})


def answers(results):
    return [line["filtered_resps"][0] for line in results.samples["colors"]]


@pytest.fixture(scope="session")
def text_questions(questions):
    path = questions.with_name("text.jsonl")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "image"}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("family", ["vlm", "language_model"])
def test_answers_do_not_depend_on_batch_size_or_workers(family, request, questions, text_questions):
    model, path = request.getfixturevalue(family), questions if family == "vlm" else text_questions
    single = run(model, path, batch_size=1)
    assert len(set(answers(single))) > 3  # else this test would see nothing
    for options in ({"batch_size": 4}, {"batch_size": 12}, {"batch_size": 2, "num_workers": 2}):
        other = run(model, path, **options)
        assert answers(other) == answers(single)
        assert [line["doc_id"] for line in other.samples["colors"]] == list(range(12))
        assert [line["target"] for line in other.samples["colors"]] == [
            line["target"] for line in single.samples["colors"]
        ]


def test_an_answer_is_what_the_model_alone_generates(vlm, questions):
    """Against transformers' own road for one row: no second beginning-of-text token, stop at the end of turn."""
    model, processor = vlm
    line = run(vlm, questions, batch_size=4).samples["colors"][2]
    assert line["arguments"][0].startswith("<s>user: ")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": line["doc"]["question"]}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == line["arguments"][0]
    inputs = processor(
        text=text, images=Image.open(questions.with_name("blue.png")), add_special_tokens=False, return_tensors="pt"
    )
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(ids, skip_special_tokens=True).strip() == line["filtered_resps"][0]


def test_the_order_of_the_rows_does_not_matter(vlm, questions, tmp_path):
    lines = questions.read_text().splitlines(keepends=True)
    backwards = questions.with_name("backwards.jsonl")
    backwards.write_text("".join(reversed(lines)))
    assert answers(run(vlm, backwards, batch_size=5)) == answers(run(vlm, questions, batch_size=5))[::-1]


def test_equal_runs_differ_only_under_run(vlm, questions, tmp_path):
    runs = [run(vlm, questions, batch_size=4) for _ in range(2)]
    paths = [results.save(tmp_path / str(number)) for number, results in enumerate(runs)]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["run"] != second["run"]
    assert {**first, "run": None} == {**second, "run": None}
    samples = [next(path.parent.glob("samples_colors_*.jsonl")).read_text() for path in paths]
    assert samples[0] == samples[1]
    summaries = [(path.parent / "summary.md").read_text() for path in paths]
    assert summaries[0] == summaries[1]


def test_limit_is_marked(vlm, questions):
    results = run(vlm, questions, batch_size=4, limit=5)
    assert results.data["n-samples"]["colors"] == {"original": 12, "effective": 5}
    assert results.data["results"]["colors"]["sample_len"] == 5
    assert "first 5 of 12 rows" in results.markdown()


def test_shuffled_images(vlm, questions):
    plain, shuffled = run(vlm, questions), run(vlm, questions, shuffle_images=True)
    assert shuffled.data["config"]["shuffle_images"]
    assert "another row's picture" in shuffled.markdown() and "another" not in plain.markdown()
    for mine, theirs in zip(plain.samples["colors"], shuffled.samples["colors"], strict=True):
        assert mine["doc_hash"] == theirs["doc_hash"]  # the row itself stays what it is
        if mine["doc"]["image"]:
            other = plain.samples["colors"][theirs["image_from"]]
            assert other["doc"]["image"] != mine["doc"]["image"]
    changed = sum(a != b for a, b in zip(answers(plain), answers(shuffled), strict=True))
    assert changed >= 3
    assert answers(shuffled) == answers(run(vlm, questions, shuffle_images=True, batch_size=3, num_workers=2))
    assert answers(shuffled)[5] == answers(plain)[5]  # the row without a picture


def test_shuffled_images_with_one_picture_only(vlm, questions):
    same = questions.with_name("same.jsonl")
    same.write_text("".join(json.dumps({"image": "red.png", "question": "q?", "answer": "a"}) + "\n" for _ in range(3)))
    with pytest.raises(InputError, match="same picture"):
        run(vlm, same, shuffle_images=True)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_no_row_keeps_its_picture(count):
    order = other_rows(count, seed=1)
    assert sorted(order) == list(range(count))
    assert all(index != other for index, other in enumerate(order))
    assert order == other_rows(count, seed=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "missing.png", "question": "q?", "answer": "a"}, "missing.png"),
        ({"image": "red.png", "question": "q?"}, "no reference answer"),
        ({"image": "red.png", "question": "q?", "answers": []}, "no reference answer"),
    ],
)
def test_bad_rows_stop_the_run_and_are_named(vlm, questions, row, message, workers):
    path = questions.with_name("bad.jsonl")
    path.write_text(json.dumps({"image": "red.png", "question": "q?", "answer": "a"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message) as caught:
        run(vlm, path, num_workers=workers)
    assert "bad.jsonl:2" in str(caught.value)


def test_pictures_for_a_text_only_model(language_model, questions):
    with pytest.raises(InputError, match="reads text only"):
        run(language_model, questions)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "mistral3"])
def test_prompts_begin_as_the_processors_own(family, questions):
    """LLaVA's templates leave the begin of text to the processor."""
    processor = load_processor(families.made(family))
    rows = Rows(task(questions).source)
    (row,), inputs = next(iter(PromptBatches(task(questions), rows, [0], processor, 1)))
    messages = rows[0].messages(structured=True)
    for part in (part for turn in messages for part in turn["content"] if part["type"] == "image"):
        part["image"] = rows[0].images[0]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    own = processor.apply_chat_template([messages], add_generation_prompt=True, **options)
    assert row.doc_id == 0 and inputs["input_ids"].tolist() == own["input_ids"].tolist()


def test_the_model_is_given_back_as_it_was(vlm, questions):
    vlm[0].train()
    run(vlm, questions, limit=1)
    assert vlm[0].training
    vlm[0].eval()


@pytest.fixture(scope="session")
def model_folder(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vlm[0].save_pretrained(folder)
    vlm[1].save_pretrained(folder)
    return folder


def test_load_both_kinds(model_folder, language_model, tmp_path):
    model, processor = load(str(model_folder))
    assert type(model).__name__ == "LlavaForConditionalGeneration" and hasattr(processor, "image_processor")
    language_model[0].save_pretrained(tmp_path)
    language_model[1].save_pretrained(tmp_path)
    model, processor = load(str(tmp_path), dtype="bfloat16", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.bfloat16


def test_folders_that_cannot_be_loaded(model_folder, tmp_path):
    with pytest.raises(InputError, match="no such model folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"no config\.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    with pytest.raises(InputError, match="no weights"):
        load(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match="pickle"):
        load(str(tmp_path))
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"lm_head.weight": torch.zeros(320, 32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lack"):
        load(str(tmp_path))
    with pytest.raises(InputError, match="dtype"):
        load(str(model_folder), dtype="float33")


def test_command_and_two_ranks(model_folder, questions, tmp_path):
    """The command in one process and on two ranks of torchrun writes the same samples; two go on with what one left."""
    results = run_command(
        str(model_folder), f"colors={questions}", metric="exact_match", batch_size=3, output_path=str(tmp_path / "one")
    )
    loaded = Results.load(tmp_path / "one")
    assert loaded.data == results.data and loaded.samples == results.samples
    options = {"batch_size": 3, "num_workers": 0, "progress": False, "output_path": tmp_path / "two"}
    tasks = chosen_tasks(None, {"colors": str(questions)}, metric="exact_match")
    evaluate(*load(str(model_folder)), tasks, model_name=str(model_folder), **options)
    journal = next((tmp_path / "two").rglob("unfinished_colors_rank0.jsonl"))
    mark, *lines = journal.read_text().splitlines(keepends=True)
    known = [json.loads(line) | {"category": "from the journal"} for line in lines[:5]]
    journal.write_text(mark + "".join(json.dumps(line) + "\n" for line in known))
    script = tmp_path / "run.py"
    script.write_text(
        "import torch; torch.set_num_threads(1)\n"
        "from vlm_taid.evaluation import run_command\n"
        f"run_command({str(model_folder)!r}, {{'colors': {str(questions)!r}}}, metric='exact_match', batch_size=3,"
        f" num_workers=0, output_path={str(tmp_path / 'two')!r}, resume=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    ran = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    two = Results.load(tmp_path / "two")
    marked = [line["doc_id"] for line in two.samples["colors"] if line["category"] == "from the journal"]
    assert sorted(marked) == sorted(line["doc_id"] for line in known)
    plain = [{**line, "category": None} for line in results.samples["colors"]]
    assert [{**line, "category": None} for line in two.samples["colors"]] == plain
    assert two.data["results"] == results.data["results"]
    assert not list((tmp_path / "two").rglob("unfinished_*"))
    assert len(list((tmp_path / "two").rglob("results_*.json"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "colors"}, "NAME=VALUE"),
        ({"data": "a=x,a=y"}, "twice"),
        ({"data": ""}, "nothing to run"),
        ({"data": "a=x.jsonl", "tasks": "b"}, "'b' is no benchmark and has no file"),
        ({"data": "a=x.jsonl", "metric": "exact"}, "unknown metric"),
        ({"data": "a=x.jsonl", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_command_refuses(options, message):
    with pytest.raises(InputError, match=message):
        run_command("nothing", **options)
