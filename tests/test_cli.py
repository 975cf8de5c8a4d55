"""Bad input by hand: each is one clear sentence on stderr and exit status 2, not a traceback."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import families, runs
from vlm_taid.cli import main
from vlm_taid.data import SourceOptions
from vlm_taid.evaluation import score_command
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.recipe import Recipe


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return families.llava(folder / "student", seed=1, width=16), families.llava(folder / "teacher")


@pytest.fixture
def recipe(pair, tmp_path):
    """A good recipe over two rows, and the two rows' file."""
    data = families.vqa_rows(tmp_path / "data", rows=2)
    path = runs.recipe_file(tmp_path / "run.yaml", *pair, data, max_steps=1, per_device_train_batch_size=2)
    content = yaml.safe_load(path.read_text())
    content["data"]["on_bad_row"] = "error"
    path.write_text(yaml.safe_dump(content))
    return path, Path(data)


def fails(capfd, *arguments) -> str:
    capfd.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1] if "vlm-taid" not in error else error[error.index("vlm-taid") :].strip()
    return line


def rewrite(path: Path, number: int, **changes):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_good_recipe_runs(recipe):
    assert main(["distill", "--config", str(recipe[0])]) == 0


def missing_image(data):
    rewrite(data, 1, image="gone.png")
    return "gone.png"


def truncated_png(data):
    whole = (data.parent / "1.png").read_bytes()
    (data.parent / "1.png").write_bytes(whole[: len(whole) // 2])
    return "1.png"


def bomb(data):
    Image.new("1", (20000, 20000)).save(data.parent / "1.png")
    return "pixels"


def outside(data):
    Image.new("RGB", (8, 8)).save(data.parent.parent / "secret.png")
    rewrite(data, 1, image="../secret.png")
    return "secret.png"


def url(data):
    rewrite(data, 1, image="http://127.0.0.1:9/a.png")
    return "allow_urls"


def empty_answer(data):
    rewrite(data, 1, answer="  ")
    return "answer"


BAD_ROWS = [missing_image, truncated_png, bomb, outside, url, empty_answer]


@pytest.mark.parametrize("spoil", BAD_ROWS)
def test_bad_row_is_named(recipe, capfd, spoil):
    path, data = recipe
    named = spoil(data)
    message = fails(capfd, "distill", "--config", path)
    assert f"{data}:2" in message and named in message


def test_failing_run_with_workers_exits(recipe):
    path, data = recipe
    for _ in range(5):  # rows enough for the worker to be alive when the bad one is met
        data.write_text(data.read_text() * 2)
    rewrite(data, 1, answer=" ")
    arguments = ["--training.dataloader_num_workers", "1", "--training.seed", "3"]
    command = [*runs.command(path, None), *arguments, "--training.max_steps", "40"]
    ended = subprocess.run(command, timeout=runs.LIMIT, capture_output=True, text=True)
    assert ended.returncode == 2 and "Error" not in ended.stderr
    assert f"{data}:2" in ended.stderr and "answer" in ended.stderr


@pytest.mark.parametrize("spoil", BAD_ROWS)
def test_bad_row_is_skipped_and_counted_when_asked(recipe, spoil, capfd):
    path, data = recipe
    named = spoil(data)
    assert main(["distill", "--config", str(path), "--data.on_bad_row", "skip"]) == 0
    listed = [json.loads(line) for line in (runs.output_of(path) / "refused_rows.jsonl").read_text().splitlines()]
    assert len(listed) == 1 and f"{data}:2" in listed[0]["row"] and named in listed[0]["row"]
    assert "1 rows were skipped" in capfd.readouterr().out
    assert runs.metrics(runs.output_of(path), "refused_rows") == [(1,)]


def test_long_row_is_named_and_never_cut(recipe, capfd):
    path, data = recipe
    message = fails(capfd, "distill", "--config", path, "--data.max_length", 20)
    assert f"{data}:" in message and "tokens" in message and "max_length" in message


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--training.max_step", "3"], "training.max_steps"),
        (["--training.report_to", "clearmll"], "training.report_to: clearmll is not installed (pip install clearmll)"),
        (["--training.gradient_accumulation_steps", "0"], "training.gradient_accumulation_steps is 0: at least 1"),
        (["--training.learning_rat", "1"], "training.learning_rate"),
        (["--objective.t_strat", "0.4"], "objective.t_start"),
        (["--data.max_len", "4"], "data.max_length"),
        (["--training.max_steps", "ten"], "max_steps"),
        (["--objective.name", "tiad"], "taid"),
        (["--teacher.quantize", "5bit"], "teacher.quantize: one of '4bit', '8bit' was expected, found 5bit"),
        (["--student.dtype", "float99"], "student.dtype: one of 'auto', 'float32', 'bfloat16', 'float16' was expected"),
        (["--objective.t_start", "2"], "t_start"),
        (["--teacher", "null"], "teacher.path"),
        (["--student.path", "no/such/folder"], "no/such/folder"),
        (["--data.train", "[]"], "data.train"),
        (["--objective.name", "fkl", "--objective.alpha", "0.1"], "objective.alpha"),
        (["--objective.weight", "0.2"], "objective.divergence: js"),
        (["--objective.temperature", "0"], "temperature must be positive"),
        (["--teacher.zero_stage", "3"], "teacher.zero_stage"),
        (["--training.eval_strategy", "steps"], "data.validation"),
        (["--training.train_sampling_strategy", "batch_rebalance"], "batch_rebalance"),
        (["--training.resume_from_checkpoint", "x"], "training.resume"),
        (["--training.optim", "galore_adamw"], "galore"),
        (["--student.attn_implementation", "flash_attention_2"], "FlashAttention"),
        (["--training.deepspeed", "configs/deepspeed/zero2.json"], "deepspeed --num_gpus"),
    ],
)
def test_wrong_option_names_the_key(recipe, capfd, arguments, expected):
    assert expected in fails(capfd, "distill", "--config", recipe[0], *arguments)


def test_unknown_key_of_a_file_names_the_nearest(recipe, capfd):
    path, _ = recipe
    content = yaml.safe_load(path.read_text())
    content["objective"]["t_strat"] = 0.3
    path.write_text(yaml.safe_dump(content))
    message = fails(capfd, "distill", "--config", path)
    assert "t_strat" in message and "t_start" in message


@pytest.mark.parametrize(
    ("command", "near"),
    [
        (["inspect", "--rowz", "3"], "(nearest known key: rows)"),
        (["plan", "--gpus", "1", "--lenght", "3"], "(nearest known key: length)"),
        (["cache", "--output", "x", "--data.trian", "y"], "(nearest known key: data.train)"),
        (["plan", "--gpu", "1"], "--gpus"),
        (["inspect", "--rows", "x"], "--rows"),
    ],
)
def test_unknown_option_of_a_command_beside_the_recipes(recipe, capfd, command, near):
    assert near in fails(capfd, *command, "--config", recipe[0])


@pytest.mark.parametrize("entry", ["--data.train.0.limit", "--data.train[0].limit", "--data.train.-1.limit=3"])
def test_an_entry_of_a_list_has_no_number(recipe, capfd, entry):
    message = fails(capfd, "distill", "--config", recipe[0], entry, *([] if "=" in entry else ["3"]))
    assert "data.train is a list" in message and "--data.train.limit VALUE changes its last entry" in message


def test_what_the_hint_on_lists_says_is_so(recipe):
    added = ["--data.train+", "{path: more.jsonl, format: vqa}", "--data.train.limit", "3"]
    first, last = Recipe.load(recipe[0], added).data.train
    assert (first.limit, last.path, last.limit) == (None, "more.jsonl", 3)
    (only,) = Recipe.load(recipe[0], ["--data.train", "[{path: other.jsonl, format: vqa}]"]).data.train
    assert only.path == "other.jsonl"


def test_a_list_that_replaces_one_of_its_length_takes_nothing_from_it(recipe, capfd, tmp_path):
    content = yaml.safe_load(recipe[0].read_text())
    content["data"]["train"] = [{"path": "a.jsonl", "format": "llava", "limit": 5, "columns": {"image": "picture"}}]
    recipe[0].write_text(yaml.safe_dump(content))
    later = tmp_path / "later.yaml"
    later.write_text("data: {train: [{path: b.jsonl, format: vqa}]}")
    for overrides in (["--data.train", "[{path: b.jsonl, format: vqa}]"], ["--config", str(later)]):
        assert Recipe.load(recipe[0], overrides).data.train == [SourceOptions("b.jsonl", "vqa")]
    assert "format" in fails(capfd, "distill", "--config", recipe[0], "--data.train", "[{path: b.jsonl}]")
    (changed,) = Recipe.load(recipe[0], ["--data.train.limit", "3"]).data.train
    assert (changed.path, changed.limit, changed.columns) == ("a.jsonl", 3, {"image": "picture"})


def test_a_place_that_cannot_be_written_is_named(recipe, capfd, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails(capfd, "inspect", "--config", recipe[0], "--rows", "1", "--html", tmp_path / "file" / "x.html")
    assert f"{tmp_path / 'file'}: File exists" in message


def test_an_empty_file_a_model_that_is_not_there_and_no_gpu(recipe, capfd, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    data = f"[{{path: {empty}, format: vqa}}]"
    assert "empty.jsonl: the file is empty" in fails(capfd, "inspect", "--config", recipe[0], "--data.train", data)
    message = fails(capfd, "inspect", "--config", recipe[0], "--student.path", "models/nowhere")
    assert "There is no such folder here, so it was looked for on the hub" in message
    assert "--gpus is 0" in fails(capfd, "plan", "--config", recipe[0], "--gpus", "0")


def test_a_run_that_trains_on_no_row_fails_at_its_last_step(recipe, capfd):
    few = ["--training.per_device_train_batch_size", "1", "--data.max_length", "2", "--data.on_bad_row", "skip"]
    assert "no row can be trained on" in fails(capfd, "distill", "--config", recipe[0], *few)
    none = ["--training.per_device_train_batch_size", "0"]
    assert "per_device_train_batch_size is 0" in fails(capfd, "distill", "--config", recipe[0], *none)


def test_eval_help_names_the_commands(capsys):
    assert main(["eval", "--help"]) == 0
    assert "vlm-taid eval compare" in capsys.readouterr().out


def test_unknown_command(capfd):
    assert "there are: distill, " in fails(capfd, "distil")


LETTERS = "абвгдежзиклмн"


def test_vocabularies_that_share_few_tokens(recipe, capfd, tmp_path):
    """A teacher whose tokenizer knows words alone, of another language."""
    path, _ = recipe
    student = Path(yaml.safe_load(path.read_text())["student"]["path"])
    processor = load_processor(student)
    words = Tokenizer(models.WordLevel(unk_token="[unk]"))
    lines = pre_tokenizers.Split("\n", "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Metaspace(prepend_scheme="never")])
    special = processor.tokenizer.all_special_tokens
    words.train_from_iterator(
        ["Hello", "user\n", " ".join(a + b for a in LETTERS for b in LETTERS)],
        trainers.WordLevelTrainer(special_tokens=["[unk]", *special]),
    )
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=special
    )
    model = load_model(ModelOptions(str(student)))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    message = fails(capfd, "distill", "--config", path, "--teacher.path", tmp_path)
    assert "vocabularies share" in message and "of the teacher's family" in message


def test_model_folder_without_weights_and_with_a_pickle(recipe, capfd, tmp_path):
    path, _ = recipe
    student = Path(yaml.safe_load(path.read_text())["student"]["path"])
    for name, expected in (("empty", "no weights"), ("pickled", "pickle")):
        folder = tmp_path / name
        folder.mkdir()
        for file in student.iterdir():
            if file.suffix != ".safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        if name == "pickled":
            torch.save({}, folder / "pytorch_model.bin")
        assert expected in fails(capfd, "distill", "--config", path, "--student.path", folder)


def test_long_row_is_skipped_among_good_ones(recipe):
    path, data = recipe
    rewrite(data, 1, question="is there a red circle in the image? " * 10)
    assert main(["distill", "--config", str(path), "--data.on_bad_row", "skip", "--data.max_length", "60"]) == 0
    listed = (runs.output_of(path) / "refused_rows.jsonl").read_text().splitlines()
    assert len(listed) == 1 and f"{data}:2" in listed[0] and "max_length = 60" in listed[0]
    assert runs.metrics(runs.output_of(path), "refused_rows") == [(1,)]


def test_no_usable_row_is_no_success(recipe, capfd):
    message = fails(capfd, "distill", "--config", recipe[0], "--data.on_bad_row=skip", "--data.max_length=3")
    assert "no row can be trained on" in message and "max_length" in message


def test_damaged_weights_are_named(recipe, capfd, tmp_path):
    path, _ = recipe
    student = Path(yaml.safe_load(path.read_text())["student"]["path"])
    for file in student.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert str(tmp_path) in fails(capfd, "distill", "--config", path, "--student.path", tmp_path)


def test_print_config_is_commented_and_loads(recipe, capsys):
    path, _ = recipe
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "# " in printed and "t_start" in printed
    again = path.with_name("again.yaml")
    again.write_text(printed)
    assert Recipe.load(again) == Recipe.load(path)


def test_help_has_a_sentence_for_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for sentence in ("interpolation at the first step", "Total number of training steps", "longest row in tokens"):
        assert sentence.lower() in printed.lower()


def test_eval_run_and_report(recipe, tmp_path, capsys):
    path, data = recipe
    assert main(["distill", "--config", str(path)]) == 0
    run = runs.output_of(path)
    score = ["eval", "run", "--model", str(run), "--data", f"squares={data}", "--metric", "exact_match"]
    assert main([*score, "--batch-size", "2", "--num-workers", "0", "--output_path", str(tmp_path / "scores")]) == 0
    samples = next((tmp_path / "scores").rglob("samples_squares_*.jsonl"))
    results = json.loads(next((tmp_path / "scores").rglob("results_*.json")).read_text())["results"]["squares"]
    scored = score_command(str(samples), "exact_match")
    assert scored.value == results["exact_match,none"] and scored.stderr == results["exact_match_stderr,none"]
    assert main(["eval", "score", "--predictions", str(samples), "--metric", "exact_match"]) == 0
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--evaluations", f"student={tmp_path / 'scores'}", "--output", str(page)]) == 0
    assert "squares" in capsys.readouterr().out and "student" in page.read_text()


def test_eval_of_bad_input(recipe, capfd, tmp_path):
    path, data = recipe
    student = yaml.safe_load(path.read_text())["student"]["path"]
    assert "eval run" in fails(capfd, "eval", "scores")
    assert "metric" in fails(capfd, "eval", "run", "--model", student, "--data", f"a={data}", "--metri", "x")
    assert "no such model folder" in fails(capfd, "eval", "run", "--model", tmp_path / "gone", "--data", f"a={data}")
    missing_image(data)
    message = fails(capfd, "eval", "run", "--model", student, "--data", f"a={data}", "--num_workers", "1")
    assert f"{data}:2" in message and "gone.png" in message


def test_quickstart_students_differ_in_the_objective_alone():
    """The two recipes that scripts/quickstart.sh runs."""
    sft = ["--objective.name", "sft", "--training.output_dir", "runs/quickstart/sft"]
    taid, other = Recipe.load("configs/quickstart.yaml"), Recipe.load("configs/quickstart.yaml", sft)
    script = Path("scripts/quickstart.sh").read_text()
    assert "--config configs/quickstart.yaml" in script and "train taid taid" in script and "train sft sft" in script
    assert taid.student == other.student and taid.data == other.data
    assert taid.training | {"output_dir": ""} == other.training | {"output_dir": ""}
    assert Recipe.load("configs/quickstart_teacher.yaml").objective.name == "sft"
