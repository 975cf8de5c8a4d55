"""Formats: rows become turns, pictures stand at their marks, bad rows say what is wrong."""

from datetime import datetime

import pytest
from PIL import Image

from vlm_taid.data import FORMATS, RowContext
from vlm_taid.errors import BadRow

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


@pytest.fixture
def convert(tmp_path):
    for name in COLOURS:
        Image.new("RGB", (4, 4), name).save(tmp_path / f"{name}.png")

    def run(name, row, **options):
        return FORMATS[name](row, RowContext("f.jsonl:1", tmp_path, **options))

    return run


@pytest.fixture
def refuse(convert):
    def run(name, row, **options):
        with pytest.raises(BadRow) as caught:
            convert(name, row, **options)
        assert caught.value.row == "f.jsonl:1"
        return caught.value.reason

    return run


def shown(conversation):
    """Turns as (role, [texts and colours])."""
    names = {colour: f"<{name}>" for name, colour in COLOURS.items()}
    return [
        (turn.role, [names[part.image.getpixel((0, 0))] if part.image else part.text for part in turn.parts])
        for turn in conversation.turns
    ]


def chat(user, answer="a"):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def test_messages_with_pictures_of_every_way(convert):
    two = {"images": ["red.png", "blue.png"]}
    assert shown(convert("messages", {"messages": chat("q"), **two})) == [
        ("user", ["<red>", "<blue>", "q"]),
        ("assistant", ["a"]),
    ]
    assert shown(convert("messages", {"messages": chat("see <image> and\n<image>\nnow"), **two}))[0] == (
        "user",
        ["see ", "<red>", " and", "<blue>", "now"],
    )
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "image", "text": None}]
    assert shown(convert("messages", {"messages": chat(parts), **two}))[0][1] == ["one", "<red>", "<blue>"]
    for key in ("image", "path", "url"):
        inline = [{"type": "image", key: "blue.png"}, {"type": "text", "text": "q", "image": None}]
        assert shown(convert("messages", {"messages": chat(inline)}))[0][1] == ["<blue>", "q"]
    mixed = [{"type": "image"}, {"type": "image", "image": "blue.png"}]
    assert shown(convert("messages", {"messages": chat(mixed), "image": "red.png"}))[0][1] == ["<red>", "<blue>"]


def test_pictures_go_to_the_first_user_turn(convert):
    turns = [{"role": "system", "content": ""}, *chat("q"), *chat("r", "b")]
    conversation = convert("messages", {"messages": turns, "image": "red.png", "id": 7, "other": b"raw"})
    assert [role for role, _ in shown(conversation)] == ["system", "user", "assistant", "user", "assistant"]
    assert shown(conversation)[:2] == [("system", [""]), ("user", ["<red>", "q"])]
    assert conversation.fields == {"id": 7} and conversation.row == "f.jsonl:1" and conversation.templated


def test_answer_parts(convert):
    answer = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert shown(convert("messages", {"messages": chat("q", answer)}))[1] == ("assistant", ["a", "b"])


def test_bad_messages(refuse):
    def bad(turns, **columns):
        return refuse("messages", {"messages": turns, **columns})

    assert "unknown role 'tool'" in bad([*chat("q"), {"role": "tool", "content": "x"}])
    assert "answer is empty" in bad(chat("q", " \n"))
    assert "answer is empty" in bad(chat("q", []))
    assert "turn 1 (user): the text is empty" in bad(chat(""))
    assert "no assistant turn" in bad(chat("q")[:1])
    assert "no user turn" in bad(chat("q")[1:])
    assert "messages[1]" in bad([*chat("q")[:1], {"role": "assistant"}])
    assert "messages[0]" in bad(["q", "a"])
    assert "list of turns" in bad("q")
    assert "must have the type" in bad(chat([{"type": "audio"}]))
    assert "must be a text" in bad(chat({"a": 1}))
    assert "answers are text" in bad(chat("q", [{"type": "image"}]), image="red.png")
    assert "answers are text" in bad(chat("q", "<image>"))


@pytest.mark.parametrize("name", ["messages", "llava", "vqa"])
def test_marks_and_images_must_be_as_many(refuse, name):
    def row(text, **columns):
        return {
            "messages": {"messages": chat(text)},
            "llava": {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]},
            "vqa": {"question": text, "answer": "a"},
        }[name] | columns

    assert "2 image marks in the text, but 1 images" in refuse(name, row("<image><image>q", image="red.png"))
    assert "1 image marks in the text, but 2 images" in refuse(name, row("<image>q", images=["red.png"] * 2))
    assert "1 image marks in the text, but 0 images" in refuse(name, row("<image>q"))
    assert "'none.png': no such file" in refuse(name, row("<image>q", image="none.png"))


def test_given_pictures_do_not_use_up_the_column(refuse):
    inline = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "q"}]
    assert "0 image marks in the text, but 1 images" in refuse(
        "messages", {"messages": chat(inline), "image": "blue.png"}
    )


def test_llava(convert, refuse):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "a"},
        {"from": "human", "value": "And <image>?"},
        {"from": "gpt", "value": "b"},
    ]
    conversation = convert("llava", {"id": "1", "image": ["red.png", "blue.png"], "conversations": turns})
    assert shown(conversation) == [
        ("system", ["s"]),
        ("user", ["<red>", "What?"]),
        ("assistant", ["a"]),
        ("user", ["And ", "<blue>", "?"]),
        ("assistant", ["b"]),
    ]
    assert conversation.fields == {"id": "1"}
    text_only = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert convert("llava", {"conversations": text_only, "image": None}).images == []
    assert shown(convert("llava", {"conversations": text_only, "image": "red.png"}))[0][1] == ["<red>", "q"]
    assert "unknown role 'user'" in refuse("llava", {"conversations": [{"from": "user", "value": "q"}]})


def test_vqa_answers(convert):
    def read(**columns):
        conversation = convert("vqa", {"question": "q", **columns})
        return conversation.turns[1].text, conversation.fields["answers"]

    assert read(answer="yes") == ("yes", ["yes"])
    assert read(answers=["b", "a", "a", "b", "c"]) == ("b", ["b", "a", "a", "b", "c"])
    assert read(answers="yes") == ("yes", ["yes"])
    assert read(answer=["x", "y"]) == ("x", ["x", "y"])
    assert read(answer="x", answers=["y", "y"]) == ("x", ["y", "y"])
    assert read(answer=3) == ("3", ["3"])
    assert read(answers=[{"answer": "yes", "answer_id": 1}, {"answer": "no"}, {"answer": "no"}])[0] == "no"


def test_vqa_prompt_and_pictures(convert, refuse):
    row = {"question": "How {many}?", "answer": "2", "images": ["red.png", "blue.png"], "category": "count"}
    conversation = convert("vqa", row, prompt="{question}\nAnswer with one word.")
    assert shown(conversation)[0] == ("user", ["<red>", "<blue>", "How {many}?\nAnswer with one word."])
    assert conversation.fields == {"category": "count", "answers": ["2"]}
    caption = {"answer": "red", "image": "red.png"}
    assert shown(convert("vqa", caption, prompt="Describe it."))[0][1] == ["<red>", "Describe it."]
    assert "no {question}" in refuse("vqa", row, prompt="{qestion}")


def test_bad_vqa(refuse):
    assert "answer is empty" in refuse("vqa", {"question": "q", "answer": " "})
    assert "answer is empty" in refuse("vqa", {"question": "q", "answers": []})
    assert "must be a text" in refuse("vqa", {"question": "q", "answer": datetime(2020, 1, 1)})
    assert "text is empty" in refuse("vqa", {"question": "", "answer": "a"})


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("messages", {"chat": []}, "messages"),
        ("llava", {"chat": []}, "conversations"),
        ("vqa", {"query": "q", "answer": "a"}, "question"),
        ("vqa", {"question": "q", "label": "a"}, "answer"),
        ("prompt_completion", {"prompt": "p", "output": "c"}, "completion"),
        ("text", {"content": "t"}, "text"),
    ],
)
def test_missing_column(refuse, name, row, column):
    reason = refuse(name, row)
    assert f"column {column!r} is missing" in reason and ", ".join(row) in reason
    assert f"`columns: {{{column}: THE_NAME}}`" in reason
    assert "is null" in refuse(name, row | {column: None})


def test_prompt_completion(convert, refuse):
    plain = convert("prompt_completion", {"prompt": "2+2=", "completion": "4", "id": 1})
    assert shown(plain) == [("user", ["2+2="]), ("assistant", ["4"])] and not plain.templated
    assert plain.fields == {"id": 1}
    listed = {"prompt": chat("q")[:1], "completion": chat("q")[1:], "image": "red.png"}
    conversation = convert("prompt_completion", listed)
    assert shown(conversation) == [("user", ["<red>", "q"]), ("assistant", ["a"])] and conversation.templated
    assert "must both be" in refuse("prompt_completion", {"prompt": "q", "completion": chat("q")[1:]})
    assert "answer is empty" in refuse("prompt_completion", {"prompt": "q", "completion": ""})
    assert "cannot hold images" in refuse("prompt_completion", {"prompt": "q", "completion": "a", "image": "red.png"})


def test_text(convert, refuse):
    # A mark is nothing special in plain text.
    conversation = convert("text", {"text": "all of it <image>", "url": "u"})
    assert shown(conversation) == [("assistant", ["all of it <image>"])] and not conversation.templated
    assert conversation.fields == {"url": "u"}
    assert "empty" in refuse("text", {"text": "\n"})


def test_evaluation_rows_end_with_the_question(convert):
    def read(name, **row):
        conversation = convert(name, row, need_answer=False)
        return [turn.role for turn in conversation.turns], conversation.fields

    assert read("vqa", question="q") == (["user"], {"answers": []})
    assert read("vqa", question="q", answer="") == (["user"], {"answers": [""]})
    assert read("vqa", question="q", answers=["a", "b"]) == (["user"], {"answers": ["a", "b"]})
    assert read("messages", messages=chat("q")[:1]) == (["user"], {})
    assert read("messages", messages=chat("q")) == (["user"], {"answers": ["a"]})
    assert read("messages", messages=chat("q"), answers=["x"]) == (["user"], {"answers": ["x"]})
    assert read("messages", messages=[*chat("q"), *chat("r")]) == (
        ["user", "assistant", "user"],
        {"answers": ["a"]},
    )
    assert read("prompt_completion", prompt="p", completion="c") == (["user"], {"answers": ["c"]})
    assert read("prompt_completion", prompt=chat("q")[:1]) == (["user"], {})
    assert read("text", text="t") == (["assistant"], {})
