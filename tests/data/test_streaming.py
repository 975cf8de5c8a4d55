"""Streamed rows: every row once a round whatever the readers, and from any place on as if never stopped."""

import json
from collections import Counter
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_taid.data import SourceOptions, StreamedRows
from vlm_taid.errors import BadRow, InputError


def source(path, **more):
    return SourceOptions(path=str(path), format="text", **more)


def shards(folder, kind="jsonl", count=5, rows=9):
    folder.mkdir()
    for shard in range(count):
        texts = [f"{folder.name} {shard} {row}" for row in range(rows - shard)]
        if kind == "parquet":
            table = pa.table({"text": texts, "even": [row % 2 for row in range(len(texts))]})
            pq.write_table(table, folder / f"{shard}.parquet", row_group_size=2)
        else:
            lines = [json.dumps({"text": text}) for text in texts]  # and empty lines, which are no rows
            (folder / f"{shard}.jsonl").write_text(
                "\n".join([lines[0], "", *lines[1:]]) + "\n\n"
            )  # empty lines are no rows
    return folder


def text(row):
    return row.turns[0].text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    return shards(root / "a"), shards(root / "b", "parquet"), shards(root / "c", count=1)


def streams(folders):
    a, b, c = folders
    return {
        "jsonl": StreamedRows([source(a)]),
        "parquet": StreamedRows([source(b)]),
        "concatenated": StreamedRows([source(a), source(b), source(c / "0.jsonl")], seed=1),
        "mixed": StreamedRows([source(a, weight=3), source(c, weight=1)], seed=1),
    }


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_a_round_has_every_row_once(folders, readers):
    for name in ("jsonl", "parquet"):
        stream = streams(folders)[name]
        for around in (0, 1):
            seen = Counter()
            for reader in range(readers):
                for row, place in stream.read(reader, readers):
                    if place[1][0][0] > around:
                        break
                    seen[text(row)] += place[1][0][0] == around
            assert len(seen) == 9 + 8 + 7 + 6 + 5 and set(seen.values()) == {1}


@pytest.mark.parametrize("name", ["jsonl", "parquet", "concatenated", "mixed"])
def test_every_place_is_one_to_go_on_from(folders, name):
    """Over the ends of shards, sources and rounds."""
    stream = streams(folders)[name]
    for reader, readers in ((0, 1), (1, 2)):
        rows = list(islice(stream.read(reader, readers), 150))
        for at in range(0, 140, 7):
            place = json.loads(json.dumps(rows[at][1]))
            assert list(islice(stream.read(reader, readers, place), 9)) == rows[at + 1 : at + 10]


def test_order(folders):
    a, c = folders[0], folders[2]
    rows = [row for row, _ in islice(StreamedRows([source(a)], shuffled=False).read(0, 1), 36)]
    assert [text(row) for row in rows[:9]] == [f"a 0 {row}" for row in range(9)] and text(rows[35]) == "a 0 0"
    assert rows[1].row == f"{a / '0.jsonl'}:3"  # the line, as in a loaded file
    first, second = (
        [text(row) for row, _ in islice(StreamedRows([source(a)], seed=seed).read(0, 1), 70)] for seed in (0, 1)
    )
    assert first[:35] != second[:35] and sorted(first[:35]) == sorted(second[:35]) == sorted(first[35:])
    assert first[:35] != first[35:]  # another order of shards in each round
    mixed = Counter(text(row)[0] for row, _ in islice(streams(folders)["mixed"].read(0, 1), 2000))
    assert 0.22 < mixed["c"] / 2000 < 0.28
    both = [text(row)[0] for row, _ in islice(StreamedRows([source(c), source(a)]).read(0, 1), 88)]
    assert both == ["c"] * 9 + ["a"] * 35 + ["c"] * 9 + ["a"] * 35


def test_filter_columns_and_pictures(tmp_path, folders):
    stream = StreamedRows([source(folders[1], filter={"even": 0})], shuffled=False)
    assert [text(row) for row, _ in islice(stream.read(0, 1), 6)] == [f"b 0 {i}" for i in (0, 2, 4, 6, 8)] + ["b 1 0"]
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text('{"query": "what?", "answer": "red", "image": "red.png"}\n{"query": \n')
    options = SourceOptions(path=str(tmp_path / "rows.jsonl"), format="vqa", columns={"question": "query"})
    rows = [row for row, _ in islice(StreamedRows([options], on_bad_row="skip").read(0, 1), 2)]
    assert rows[0].images[0].size == (8, 6)
    assert isinstance(rows[1], BadRow) and "rows.jsonl:2" in str(rows[1]) and "no JSON" in str(rows[1])
    with pytest.raises(BadRow, match="jsonl:2"):
        list(islice(StreamedRows([options]).read(0, 1), 2))


def test_what_cannot_be_streamed_is_said(tmp_path, folders):
    (tmp_path / "array.json").write_text("[]")
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / "mixed" / name).write_text("x\n")
    for options, said in (
        (source(folders[0], limit=3), "limit"),
        (source(tmp_path / "array.json"), "one object a line"),
        (source(tmp_path / "mixed"), "one kind"),
        (source(tmp_path / "gone"), "gone"),
    ):
        with pytest.raises(InputError, match=said):
            StreamedRows([options])
    with pytest.raises(InputError, match="reader 11 of 64"):
        next(StreamedRows([source(folders[2])]).read(10, 64))
    with pytest.raises(InputError, match="names no column"):
        next(StreamedRows([source(folders[1], filter={"odd": 1})]).read(0, 1))
