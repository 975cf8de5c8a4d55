"""Sources: files and folders of every kind, row names, filters, mixtures, and what cannot be read."""

import csv
import json
import pickle
import re
from collections import Counter
from dataclasses import fields
from io import BytesIO

import datasets
import jsonargparse
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vlm_taid.data import Conversation, ConversationDataset, DataOptions, SourceOptions
from vlm_taid.errors import BadRow, InputError


@pytest.fixture(autouse=True)
def offline_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def png(colour="red"):
    buffer = BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(count, **columns):
    return [{"question": f"q{number}", "answer": f"a{number}", **columns} for number in range(count)]


def read(path, format="vqa", need_answer=True, **options):
    return ConversationDataset([SourceOptions(str(path), format, **options)], need_answer=need_answer)


def asked(dataset):
    return [dataset[index].turns[0].text for index in range(len(dataset))]


def refusal(*arguments, **options):
    with pytest.raises(InputError) as caught:
        read(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def pictures(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return [
        {"question": "q0", "answer": "01", "image": "red.png"},
        {"question": "q1", "answer": "None", "image": "blue.png"},
    ]


def check_pictures(dataset, names):
    rows = [dataset[index] for index in range(len(dataset))]
    assert [row.turns[1].text for row in rows] == ["01", "None"]
    assert [row.images[0].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (0, 0, 255)]
    assert [row.row for row in rows] == names


def test_jsonl_json_csv_tsv(tmp_path, pictures):
    check_pictures(read(write_jsonl(tmp_path / "r.jsonl", pictures)), [f"{tmp_path}/r.jsonl:{n}" for n in (1, 2)])
    write_jsonl(tmp_path / "lines.json", pictures)
    (tmp_path / "array.json").write_text(json.dumps(pictures, indent=1))
    for name, separator in (("c.csv", ","), ("t.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(pictures[0]), delimiter=separator)
            writer.writeheader()
            writer.writerows(pictures)
    for name in ("lines.json", "array.json", "c.csv", "t.tsv"):
        check_pictures(read(tmp_path / name), [f"{tmp_path}/{name}:1", f"{tmp_path}/{name}:2"])


def test_json_values_stay_as_they_are(tmp_path):
    rows = [
        {"question": "2020-01-01", "answer": 7, "when": "2020-01-01", "deep": {"a": [1, {"b": None}]}},
        {"question": "line\u2028break", "answer": "007", "when": "2020-01-02"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for path in (write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.json"):
        first, second = list(read(path))
        assert (first.turns[0].text, first.turns[1].text, second.turns[1].text) == ("2020-01-01", "7", "007")
        assert second.turns[0].text == "line\u2028break"
        assert first.fields == {"when": "2020-01-01", "deep": {"a": [1, {"b": None}]}, "answers": ["7"]}
        assert second.fields == {"when": "2020-01-02", "answers": ["007"]}


def test_a_changed_array_is_read_anew(tmp_path):
    path = tmp_path / "a.json"
    for count in (2, 3):
        path.write_text(json.dumps(questions(count)))
        assert len(read(path)) == count


def test_parquet_and_saved_folders(tmp_path, pictures):
    content = {"question": ["q0", "q1"], "answer": ["01", "None"], "image": [png("red"), png("blue")]}
    table = datasets.Dataset.from_dict(content)
    table.to_parquet(tmp_path / "bytes.parquet")
    typed = table.cast_column("image", datasets.Image())
    typed.to_parquet(tmp_path / "typed.parquet")
    many = typed.map(lambda row: {"images": [row["image"]]}, remove_columns="image")
    many = many.cast_column("images", datasets.List(datasets.Image()))
    many.to_parquet(tmp_path / "many.parquet")
    for name in ("bytes", "typed", "many"):
        path = tmp_path / f"{name}.parquet"
        check_pictures(read(path), [f"{path}:1", f"{path}:2"])

    typed.save_to_disk(tmp_path / "saved")
    check_pictures(read(tmp_path / "saved"), [f"{tmp_path}/saved[train]:{n}" for n in (1, 2)])
    datasets.DatasetDict({"test": many}).save_to_disk(tmp_path / "splits")
    check_pictures(read(tmp_path / "splits", split="test"), [f"{tmp_path}/splits[test]:{n}" for n in (1, 2)])
    assert "no split 'train', but test" in refusal(tmp_path / "splits")

    (tmp_path / "shards").mkdir()
    typed.to_parquet(tmp_path / "shards/test-00000-of-00001.parquet")
    check_pictures(read(tmp_path / "shards", split="test"), [f"{tmp_path}/shards[test]:{n}" for n in (1, 2)])


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("place", [".", "train", "validation"])
def test_image_folder(tmp_path, kind, place):
    folder = tmp_path / "images" / place
    folder.mkdir(parents=True)
    rows = []
    for number, (colour, answer) in enumerate((("red", "01"), ("blue", "None"))):
        (folder / f"{colour}.png").write_bytes(png(colour))
        rows.append({"file_name": f"{colour}.png", "query": f"q{number}", "answer": answer})
    metadata = folder / f"metadata.{kind}"
    if kind == "jsonl":
        write_jsonl(metadata, rows)
    else:
        metadata.write_text("\n".join(",".join(row) for row in ([rows[0]] + [list(row.values()) for row in rows])))
    split = "train" if place == "." else place
    dataset = read(tmp_path / "images", columns={"question": "query"}, split=split)
    check_pictures(dataset, [f"{metadata}:1", f"{metadata}:2"])
    assert asked(dataset) == ["q0", "q1"] and dataset[0].fields == {"answers": ["01"]}
    (folder / "blue.png").unlink()
    with pytest.raises(BadRow, match=r":2: image 'blue.png': no such file"):
        dataset[1]


def test_image_root(tmp_path, pictures):
    (tmp_path / "lists").mkdir()
    path = write_jsonl(tmp_path / "lists/r.jsonl", pictures)
    with pytest.raises(BadRow, match="set `image_root`"):
        read(path)[0]
    check_pictures(read(path, image_root=str(tmp_path)), [f"{path}:1", f"{path}:2"])
    assert "is no folder" in refusal(path, image_root=str(tmp_path / "none"))


def test_columns(tmp_path):
    rows = [{"answer": "the question", "question": "the answer", "id": 5}]
    dataset = read(write_jsonl(tmp_path / "r.jsonl", rows), columns={"question": "answer", "answer": "question"})
    assert [turn.text for turn in dataset[0].turns] == ["the question", "the answer"]
    assert dataset[0].fields == {"id": 5, "answers": ["the answer"]}
    assert "names no column; the columns are answer, question, id" in refusal(
        tmp_path / "r.jsonl", columns={"image": "picture"}
    )
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    assert "names no column" in refusal(tmp_path / "r.parquet", columns={"image": "picture"})
    with pytest.raises(BadRow, match="column 'messages' is missing"):
        read(tmp_path / "r.jsonl", "messages")[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_filter_and_limit_keep_row_numbers(tmp_path, kind):
    rows = [row | {"kind": "xyz"[number % 3], "n": number} for number, row in enumerate(questions(9))]
    path = tmp_path / f"r.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
    dataset = read(path, filter={"kind": ["y", "z"], "n": [1, 2, 3, 5, 7]}, limit=3)
    assert [dataset[index].row for index in range(3)] == [f"{path}:{n}" for n in (2, 3, 6)] and len(dataset) == 3
    assert asked(dataset) == ["q1", "q2", "q5"]
    assert asked(read(path, filter={"n": 4})) == ["q4"]
    assert "none of the 9 rows passes the filter" in refusal(path, filter={"kind": "w"})
    assert "names no column" in refusal(path, filter={"sort": "y"})
    if kind == "parquet":
        assert "its type is int64" in refusal(path, filter={"n": "many"})


def test_class_labels_are_names(tmp_path):
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = datasets.Dataset.from_dict({"question": ["q0", "q1"], "answer": [1, 0]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")[0].turns[1].text == "yes"
    assert asked(read(tmp_path / "saved", filter={"answer": "no"})) == ["q1"]


def test_lines_are_counted_as_in_the_file(tmp_path):
    (tmp_path / "r.jsonl").write_text('\ufeff{"text": "a"}\n\n  \n{"text": "b"}\r\n{"text": \n[1]', encoding="utf-8")
    dataset = read(tmp_path / "r.jsonl", "text")
    assert [(dataset[index].row[-2:], dataset[index].turns[0].text) for index in (0, 1)] == [(":1", "a"), (":4", "b")]
    with pytest.raises(BadRow, match=r"r.jsonl:5: is no JSON .* one object a line"):
        dataset[2]
    with pytest.raises(BadRow, match=r"r.jsonl:6: must be a JSON object, got list"):
        dataset[3]
    assert len(read(tmp_path / "r.jsonl", "text", filter={"text": "b"})) == 3  # broken lines are not filtered away


def test_bad_rows_stop_or_are_returned(tmp_path):
    rows = questions(4)
    rows[1]["answer"], rows[2]["image"] = "", "none.png"
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    with pytest.raises(BadRow, match=r"r.jsonl:2: .*answer is empty"):
        read(path)[1]
    dataset = ConversationDataset([SourceOptions(path, "vqa")], on_bad_row="skip")
    items = [dataset[index] for index in range(4)]
    assert [type(item) for item in items] == [Conversation, BadRow, BadRow, Conversation]
    assert items[2].row == f"{path}:3" and "none.png" in items[2].reason and items[2].__traceback__ is None


def first(items):
    return items[0]


def test_workers(tmp_path, pictures):
    path = write_jsonl(tmp_path / "r.jsonl", [*pictures, {"question": "q", "answer": ""}])
    table = datasets.Dataset.from_list(questions(2))
    table.to_parquet(tmp_path / "r.parquet")
    sources = [SourceOptions(str(tmp_path / "r.parquet"), "vqa"), SourceOptions(path, "vqa")]
    loader = DataLoader(ConversationDataset(sources), collate_fn=first, num_workers=1, multiprocessing_context="fork")
    items, read_rows = iter(loader), []
    with pytest.raises(BadRow) as caught:
        for row in items:
            read_rows.append(row)
    items._shutdown_workers()  # now, not whenever the error and what it refers to are collected
    assert [row.turns[0].text for row in read_rows] == ["q0", "q1", "q0", "q1"]
    assert str(caught.value).startswith(f"{path}:3: turn 2 (assistant): the answer is empty")
    assert caught.value.row == f"{path}:3"


def test_a_pickled_dataset_is_the_same(tmp_path, pictures):
    dataset = read(write_jsonl(tmp_path / "r.jsonl", pictures))
    check_pictures(pickle.loads(pickle.dumps(dataset)), [f"{tmp_path}/r.jsonl:1", f"{tmp_path}/r.jsonl:2"])


def test_concatenated_and_mixed(tmp_path):
    small = write_jsonl(tmp_path / "s.jsonl", [{"text": f"s{n}"} for n in range(50)])
    large = write_jsonl(tmp_path / "l.jsonl", [{"text": f"l{n}"} for n in range(300)])

    def mixture(*weights, seed=0, **options):
        sources = [SourceOptions(path, "text", weight=w) for path, w in zip((small, large), weights, strict=True)]
        return asked(ConversationDataset(sources, seed=seed, **options))

    assert mixture(None, None) == [f"s{n}" for n in range(50)] + [f"l{n}" for n in range(300)]
    mixed = mixture(3, 1)
    assert set(mixed) == {f"s{n}" for n in range(50)} | {f"l{n}" for n in range(300)}
    assert 0.7 < sum(text[0] == "s" for text in mixed) / len(mixed) < 0.8
    assert max(Counter(mixed).values()) - 1 <= len(mixed) / 50
    assert mixed == mixture(3, 1) == mixture(0.3, 0.1) != mixture(3, 1, seed=1)
    for weights in ((1, None), (1, 0), (1, -1), (1, float("nan"))):
        with pytest.raises(InputError, match="weight"):
            mixture(*weights)
    with pytest.raises(InputError, match="no data source"):
        ConversationDataset([])


def test_prompt_and_questions_without_answers(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"question": "q"}])
    dataset = read(path, need_answer=False, prompt="{question} One word.")
    assert [(turn.role, turn.text) for turn in dataset[0].turns] == [("user", "q One word.")]
    assert "for the format vqa" in refusal(path, "text", prompt="{question}")


def test_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("none.jsonl", "./none", "a/b/c", "/none/at/all", "user/rows.parquet"):
        assert "there is no such file or folder" in refusal(path)
    assert "looked for on the hub" in refusal("no-such-user/no-such-rows")
    for name, content in {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \n",
        "empty.csv": b"",
        "header.csv": b"question,answer\n",
        "broken.json": b'[{"a": 1}, ',
        "broken.parquet": b"PAR1 no",
        "wide.csv": b"question,answer\na,b\nc,d,e\n",
        "latin.jsonl": b'{"text": "\xe9"}\n',
        "rows.xml": b"<a/>",
        "rows.jsonl.gz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(name), name
    assert "expected .jsonl, .json" in refusal("rows.xml")
    (tmp_path / "folder").mkdir()
    assert "folder" in refusal("folder")
    write_jsonl(tmp_path / "r.jsonl", questions(1))
    assert "no split" in refusal("r.jsonl", split="train[:10]")
    assert "unknown format" in refusal("r.jsonl", "chat")
    assert "limit" in refusal("r.jsonl", limit=0)


def test_names_with_pattern_letters(tmp_path):
    assert asked(read(write_jsonl(tmp_path / "a[1]*.jsonl", questions(2)))) == ["q0", "q1"]


def test_loading_is_lazy(tmp_path):
    """40,000 rows are not parsed at start: the time would tell, but a broken row tells surely."""
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n' * 40_000 + "broken\n")
    dataset = read(path, "text")
    assert len(dataset) == 40_001 and dataset[39_999].row == f"{path}:40000"
    assert isinstance(dataset.row_R, np.ndarray)


def test_options_are_a_command_lines(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--data", type=DataOptions)
    parsed = parser.parse_args(["--data.train", '[{"path": "r.jsonl", "format": "vqa", "filter": {"n": [1, "x"]}}]'])
    options = parser.instantiate_classes(parsed).data
    assert options.train == [SourceOptions("r.jsonl", "vqa", filter={"n": [1, "x"]})]

    parser.add_argument("--source", type=SourceOptions)
    parser.print_help()
    shown = capsys.readouterr().out
    for options_class in (DataOptions, SourceOptions):
        for option in fields(options_class):
            line = next(line for line in shown.splitlines() if line.startswith("  --") and f".{option.name} " in line)
            text = line + shown.partition(line)[2].split("\n  --")[0]
            assert re.search(r"\w[)}\"]?\.\"?\.? \((type|required)", text), option.name
