"""Each shipped benchmark: its file is read, its rows are asked and its answers scored, here without any download."""

import csv
import json

import pytest

from tests import benchmark_rows as benchmarks
from vlm_taid.cli import main
from vlm_taid.errors import BadRow, InputError
from vlm_taid.evaluation import Results, run_command, score_command
from vlm_taid.evaluation.groups import groups
from vlm_taid.evaluation.readers import Row, image_sha256
from vlm_taid.evaluation.results import sample_line
from vlm_taid.evaluation.scoring import SCORINGS, summary
from vlm_taid.evaluation.tasks import known_tasks, read_task, shipped_tasks

TASKS = sorted(shipped_tasks())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return {name: benchmarks.write(name, folder) for name in TASKS}


@pytest.fixture(scope="module")
def run(vlm, files, tmp_path_factory):
    """All benchmarks answered by one tiny model, through the command."""
    folder = tmp_path_factory.mktemp("run")
    vlm[0].save_pretrained(folder / "tiny")
    vlm[1].save_pretrained(folder / "tiny")
    data = {name: path for name, (path, _) in files.items()}
    results = run_command(
        str(folder / "tiny"), data, TASKS, max_new_tokens=3, num_workers=0, output_path=str(folder / "out")
    )
    return results, folder / "out"


def right_lines(name, path, answers, **options):
    """Samples as a run would write them if the model gave these answers."""
    task = shipped_tasks()[name].build(path, **options)
    rows, lines = task.rows(), []
    for index, answer in enumerate(answers):
        conversation = rows[index]
        doc = {**conversation.fields, "image": [image_sha256(image) for image in conversation.images]}
        references = task.references(conversation.fields, conversation.row)
        category = conversation.fields.get(task.category)
        row = Row(index, doc, references, None if category is None else str(category), conversation.turns[0].text, [])
        lines.append(sample_line(row, answer, task))
    return task, lines


def test_there_are_twenty():
    assert len(TASKS) == 20
    assert set(groups()["open_vlm_leaderboard"].tasks) <= set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_one(name, files):
    path, answers = files[name]
    for flavor in shipped_tasks()[name].flavors:
        task, lines = right_lines(name, path, answers, flavor=flavor)
        assert task.metric in SCORINGS
        found = summary(lines, task.metric)
        assert found["sample_len"] == len(answers) and found["n_errors"] == 0
        key = SCORINGS[task.metric].key
        if name == "mmvet":
            assert found["n_unjudged"] == len(answers) and found[f"{key},none"] is None
        elif flavor == next(iter(shipped_tasks()[name].flavors)) and name != "mme":
            assert found[f"{key},none"] == pytest.approx(1.0) and found["n_unparsed"] == 0
        elif name == "mme":
            assert found["color,none"] == 200 and found[f"{key},none"] is None  # one category of fourteen


@pytest.mark.parametrize("name", TASKS)
def test_every_style_asks_the_question(name, files):
    benchmark = shipped_tasks()[name]
    for style in {*benchmark.prompts, "none"}:
        conversation = benchmark.build(files[name][0], prompt_style=style).rows()[0]
        text = conversation.turns[-1].text
        question = str(conversation.fields["question"])
        assert question.lower().split("<image")[0] in text.lower() and "{" not in text
        assert conversation.images and (benchmark.build(files[name][0]).metric in SCORINGS)


@pytest.mark.parametrize("name", TASKS)
def test_answered_by_the_command_and_scored_anew(name, run):
    results, folder = run
    samples = next(folder.rglob(f"samples_{name}_2*.jsonl"))
    found, written = score_command(str(samples)), results.score(name)
    assert found == written
    assert score_command(str(samples), task=name) == written
    loaded = Results.load(folder)
    assert loaded.data == results.data and loaded.samples[name] == results.samples[name]


def test_prompts_of_the_styles(files):
    text = {
        style: shipped_tasks()["mmbench_en_v11"].build(files["mmbench_en_v11"][0], prompt_style=style).rows()[0]
        for style in ("vlmevalkit", "lmms", "none")
    }
    options = "A. dog\nB. bird\nC. cat\nD. fish"
    assert text["vlmevalkit"].turns[0].text == (
        f"Hint: look\nQuestion: what color is it?\nOptions:\n{options}\n"
        "Please select the correct answer from the options above. \n"
    )
    assert text["lmms"].turns[0].text.startswith("look what color is it? There are several options:\nA. dog")
    assert text["none"].turns[0].text == f"what color is it?\n{options}"
    assert "Hint" not in shipped_tasks()["mmbench_en_v11"].build(files["mmbench_en_v11"][0]).rows()[1].turns[0].text
    capitalized = shipped_tasks()["textvqa"].build(files["textvqa"][0]).rows()[0].turns[0].text
    assert capitalized == "What color is it?\nAnswer the question using a single word or phrase."


def test_flavor_takes_metric_and_prompts(files):
    task = shipped_tasks()["pope"].build(files["pope"][0], flavor="vlmevalkit")
    assert (task.metric, task.prompt_style) == ("pope_vlmevalkit", "vlmevalkit")
    task = shipped_tasks()["pope"].build(files["pope"][0])
    assert (task.metric, task.prompt_style) == ("pope_official", "lmms")
    with pytest.raises(InputError, match="hallusionbench has no flavor lmms"):
        shipped_tasks()["hallusionbench"].build("x", flavor="lmms")
    with pytest.raises(InputError, match="has no data"):
        shipped_tasks()["mmbench_en_v11"].build()


def test_pictures_of_vlmevalkit(tmp_path):
    """base64, another row's index, several in one cell, paths, and marks in the question."""
    red, blue = benchmarks.base64_png("red"), benchmarks.base64_png("blue")
    (tmp_path / "green.png").write_bytes(benchmarks.png("green"))
    rows = [
        {"index": 7, "image": red, "image_path": ""},
        {"index": 8, "image": "7", "image_path": ""},
        {"index": 9, "image": str([red, blue]), "image_path": ""},
        {"index": 10, "image": "", "image_path": "['green.png']"},
        {"index": 11, "image": str([red, blue]), "question": "<image 2> and <image 2>?"},
        {"index": 12, "image": ""},
    ]
    path = benchmarks.write_tsv(tmp_path / "kit.tsv", [{"question": "q?", "answer": "a"} | row for row in rows])
    read = shipped_tasks()["mmstar"].build(path).rows()
    colors = [[image.getpixel((0, 0)) for image in read[index].images] for index in range(6)]
    r, g, b = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    assert colors == [[r], [r], [r, b], [g], [b, b], []]
    assert [part.image is not None for part in read[4].turns[0].parts][:1] == [False]  # "Question: " goes before it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "/9j/" + "!" * 80}, "kit.tsv:1: column image: neither a path nor base64"),
        ({"image": "2"}, "kit.tsv:1: column image: it names row '2'"),
        ({"image": "gone.png"}, "kit.tsv:1: image 'gone.png'"),
        ({"question": ""}, "kit.tsv:1: column 'question' is missing or empty"),
        ({"question": "<image 3>"}, "kit.tsv:1: column question: it names <image 3>"),
    ],
)
def test_errors_name_row_and_column(row, message, tmp_path):
    rows = [{"index": 1, "image": benchmarks.base64_png("red"), "question": "q?", "answer": "a"} | row]
    rows.append({"index": 2, "image": "3", "question": "q?", "answer": "a"})
    path = benchmarks.write_tsv(tmp_path / "kit.tsv", rows)
    with pytest.raises(BadRow, match=message.replace("(", r"\(")):
        shipped_tasks()["mmstar"].build(path).rows()[0]


def test_a_wrong_letter_names_its_column(files):
    task = shipped_tasks()["mmstar"].build(files["mmstar"][0])
    with pytest.raises(BadRow, match="column answer is 'E', expected a letter of A, B"):
        task.references({"A": "x", "B": "y", "answer": "E"}, "row 1")


def test_pictures_in_another_table(tmp_path):
    questions = [{"question": "q?", "answer": "a", "imageId": name} for name in ("n2", "n1", "n3")]
    pictures = [{"id": "n1", "image": benchmarks.png("red")}, {"id": "n2", "image": benchmarks.png("blue")}]
    dataset = benchmarks.write_jsonl(tmp_path / "questions.jsonl", questions)
    table = benchmarks.write_jsonl(tmp_path / "pictures.jsonl", pictures)
    task = tmp_path / "gqa.yaml"
    task.write_text(
        f"task: mine\ndataset: {{path: {dataset}}}\npictures: {{path: {table}, key: id, row_key: imageId}}\n"
    )
    rows = read_task(task).build().rows()
    assert [rows[index].images[0].getpixel((0, 0)) for index in (0, 1)] == [(0, 0, 255), (255, 0, 0)]
    with pytest.raises(BadRow, match="column imageId: 'n3' is no id of"):
        rows[2]


def test_a_task_of_ones_own(tmp_path, files):
    """The keys that the documentation shows."""
    (tmp_path / "my_vqa.yaml").write_text(
        "task: my_vqa\n"
        f"dataset: {{path: json, data_files: {files['textvqa'][0]}, split: test}}\n"
        "columns: {image: image, question: question, answers: answers, id: question_id}\n"
        'prompt: "{question}\\nAnswer briefly."\ngeneration: {max_new_tokens: 7}\nmetric: vqa_accuracy\n'
    )
    task = known_tasks(str(tmp_path))["my_vqa"].build()
    assert task.max_new_tokens == 7 and task.metric == "vqa_accuracy"
    assert task.rows()[0].turns[0].text == "what color is it?\nAnswer briefly."
    for text, message in (
        ("task: a\nmetrik: x\n", "unknown key 'metrik'"),
        ("task: a\nmetric: x\n", "unknown metric 'x'"),
        ("- a\n", "has the key `task`"),
        ("task: a\ngeneration: {temperature: 1}\n", "greedy"),
        ("task: a\nprompts: {own: {txt: x}}\n", "prompts: own: a prompt is"),
        ("task: [\n", "YAML"),
    ):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            known_tasks(str(tmp_path / "wrong.yaml"))


def test_tasks_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "tasks"]) == 0
    printed = capsys.readouterr().out
    for name in TASKS:
        assert name in printed
    assert "open_vlm_leaderboard" in printed and "lmms: mme_lmms" in printed
    assert "columns: image, question, options, answer, index" in printed  # MMBench
    assert "columns: imageId, question, answer " in printed  # GQA


@pytest.mark.parametrize("name", TASKS)
def test_the_columns_listed_are_there(name, files):
    """What `eval tasks` says is needed stands in the benchmark's own columns, under our names for them."""
    task = shipped_tasks()[name]
    row = task.build(files[name][0]).rows().columns(0)[2]
    meant = {
        "image": {"image", "image_1", "decoded_image"},
        "options": {"A", "options", "choices", "question"},
        "answer": {"answer", "answers", "gt_answer"},
    }
    for column in task.needs:
        assert meant.get(column, {column}) & set(row), column


def test_the_leaderboards_average():
    group = groups()["open_vlm_leaderboard"]
    scores = dict.fromkeys(group.tasks, 0.5)
    scores |= {"mmbench_en_v11": 0.61225, "mmbench_cn_v11": 0.6014, "ocrbench": 0.777, "hallusionbench": 0.40123}
    found = group.summary(scores)
    assert found["mmbench_v11"] == 60.7  # (61.225 + 60.14) / 2 = 60.6825
    assert found["average"] == pytest.approx(round((60.7 + 77.7 + 40.123 + 5 * 50) / 8, 1)) and not found["missing"]
    for missing in (None, "gone"):
        fewer = scores | {"mmvet": None}
        if missing:
            del fewer["mmvet"]
        assert group.summary(fewer)["average"] is None and group.summary(fewer)["missing"] == ["mmvet"]


def test_groups_are_in_the_results(run):
    results, folder = run
    group = results.data["groups"]["open_vlm_leaderboard"]
    assert group["average"] is None and {"mathvista", "mmvet"} >= set(group["missing"]) >= {"mmvet"}
    assert "open_vlm_leaderboard" in next(folder.rglob("summary.md")).read_text()


def test_predictions_of_others(files, tmp_path, capsys):
    """VLMEvalKit's table, and a list of question ids with answers."""
    path, answers = files["mmbench_en_v11"]
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    rows = [row | {"prediction": answer} for row, answer in zip(rows, answers, strict=True)]
    table = benchmarks.write_tsv(tmp_path / "kit.tsv", rows)
    assert score_command(table, task="mmbench_en_v11").value == 1.0
    rows[2]["prediction"] = "nan"  # how VLMEvalKit's tables write an empty answer
    table = benchmarks.write_tsv(tmp_path / "kit.tsv", rows)
    assert score_command(table, task="mmbench_en_v11").value == 0.5  # one of its rotations is wrong
    assert "vanilla: 0.66" in capsys.readouterr().out
    saved = tmp_path / "answers.json"
    entries = [{"question_id": 1, "answer": "blue"}, {"question_id": 0, "answer": "red"}]
    saved.write_text(json.dumps(entries))
    assert score_command(str(saved), task="textvqa", data=files["textvqa"][0]).value == 0.5
    saved.write_text(json.dumps(entries[:1]))
    with pytest.raises(InputError, match="no answer to question 0"):
        score_command(str(saved), task="textvqa", data=files["textvqa"][0])
    saved.write_text(json.dumps([*entries, {"question_id": 9, "answer": "x"}]))
    with pytest.raises(InputError, match="1 answers have no question"):
        score_command(str(saved), task="textvqa", data=files["textvqa"][0])
    with pytest.raises(InputError, match="column prediction"):
        score_command(path, task="mmbench_en_v11")
