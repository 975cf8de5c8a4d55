"""Answers are found in the stream by text, not by tokens: against what the template is known to write."""

import pytest
import torch
from PIL import Image

from tests import families
from vlm_taid.data import Conversation, DataOptions, Part, Turn
from vlm_taid.errors import BadRow, InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.streams import StreamEncoder, same_processing
from vlm_taid.students import CHAT_TEMPLATE

FAMILIES = ["llava", "qwen2_5_vl", "fast_vlm", "llama"]
PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: getattr(families, name)(root / name) for name in FAMILIES}


@pytest.fixture
def text_encoder(folders):
    return StreamEncoder(load_processor(folders["llama"]))


def turns(*texts, image=False):
    roles = ["user", "assistant"] * len(texts)
    parts = [(Part(text),) for text in texts]
    if image:
        parts[0] = (Part(image=PICTURE), *parts[0])
    return tuple(Turn(role, part) for role, part in zip(roles, parts, strict=False))  # pyright: ignore[reportArgumentType]


def supervised(encoder, stream):
    """The supervised pieces of text, content and end of turn."""
    decode = encoder.tokenizer.decode
    return [
        (decode(stream.input_ids_T[answer.tokens]), decode(stream.input_ids_T[[answer.end_of_turn]]))
        for answer in stream.answers
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_several_turns(folders, family):
    encoder = StreamEncoder(load_processor(folders[family]))
    texts = ("what shape?", "a red circle", "and is it blue?\n", "no, it is not\nblue é😀", "sure?", "yes")
    stream = encoder.encode(Conversation(turns(*texts, image=encoder.takes_images)))
    assert supervised(encoder, stream) == [(text, "<|im_end|>") for text in texts[1::2]]
    assert all(answer.straddling == 0 for answer in stream.answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_rows_one_by_one(folders, family):
    encoder = StreamEncoder(load_processor(folders[family]))
    rows = [
        Conversation(turns("what shape?", "a red circle", image=encoder.takes_images), row="0"),
        Conversation(turns("is there a circle at the left?", "yes", "blue?", "no"), row="1"),
        Conversation(turns("what color is it?", "red", image=encoder.takes_images), row="2"),
    ]
    batch = encoder.encode_batch(rows)
    for row, stream in zip(rows, batch.streams, strict=True):
        alone = encoder.encode(row)
        assert torch.equal(alone.input_ids_T, stream.input_ids_T) and alone.answers == stream.answers
    assert batch.inputs["input_ids"].shape[0] == 3


def test_end_of_turn_is_the_special_token_and_nothing_after_it(text_encoder):
    stream = text_encoder.encode(Conversation(turns("hello", "yes")))
    answer = stream.answers[0]
    assert stream.text.endswith("yes<|im_end|>\n")
    assert answer.end_of_turn == len(stream.input_ids_T) - 2  # the newline after it is not supervised


def template(text_encoder, text):
    text_encoder.tokenizer.chat_template = text
    return StreamEncoder(text_encoder.tokenizer)


def test_template_that_strips_answers(text_encoder):
    encoder = template(
        text_encoder, CHAT_TEMPLATE.replace("{{- message['content'] -}}", "{{- message['content'] | trim -}}")
    )
    stream = encoder.encode(Conversation(turns("hello", "  yes \n")))
    assert supervised(encoder, stream) == [("yes", "<|im_end|>")]


def test_template_that_rewrites_earlier_answers_is_refused_with_the_turn(text_encoder):
    """As templates of reasoning models do: thoughts stay in the last answer alone."""
    stripped = "{{- (message['content'].split('</think>')[-1] if not loop.last else message['content']) -}}"
    encoder = template(text_encoder, CHAT_TEMPLATE.replace("{{- message['content'] -}}", stripped))
    assert supervised(encoder, encoder.encode(Conversation(turns("a", "yes", "b", "no"))))[0] == ("yes", "<|im_end|>")
    with pytest.raises(BadRow, match=r"rows\.jsonl:7: .*rewrites answer 1"):
        encoder.encode(Conversation(turns("a", "<think>x</think>yes", "b", "no"), row="rows.jsonl:7"))
    stream = encoder.encode(Conversation(turns("a", "<think>x</think>yes")))
    assert supervised(encoder, stream) == [("<think>x</think>yes", "<|im_end|>")]


def test_template_that_drops_a_turn_is_refused(text_encoder):
    last = CHAT_TEMPLATE.replace("for message in messages", "for message in messages[-2:]")
    with pytest.raises(BadRow, match="1 of 2 answers"):
        template(text_encoder, last)


def test_answer_that_holds_the_templates_own_pieces(text_encoder):
    tricky = "yes<|im_end|>\n<|im_start|>user\nyes"
    stream = text_encoder.encode(Conversation(turns("hello", tricky, "again", "no")))
    assert [answer.text for answer in stream.answers] == [tricky, "no"]


def test_template_without_end_of_turn_is_refused_for_its_end(text_encoder):
    encoder = template(text_encoder, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}")
    with pytest.raises(InputError, match="never learns to stop"):
        encoder.end_of_turn_id


@pytest.mark.parametrize("trim", [True, False])
def test_blank_before_the_answer_belongs_to_its_first_token(text_encoder, trim):
    """'Ġcircle' after "ASSISTANT:": the model generates the blank, so the token is the answer's, at -1. The same
    whether the tokenizer's offsets hold the blank or not."""
    from tokenizers import processors

    text_encoder.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    joined = "{% for m in messages %}{{ m['content'] + (' ' if loop.index0 % 2 == 0 else '<|im_end|>') }}{% endfor %}"
    encoder = template(text_encoder, joined)
    stream = encoder.encode(Conversation(turns("a red", "circle")))
    assert encoder.tokenizer.convert_ids_to_tokens(stream.input_ids_T.tolist())[-2:] == ["Ġcircle", "<|im_end|>"]
    assert stream.answers[0].tokens == [len(stream.input_ids_T) - 2] and stream.answers[0].starts == [-1]
    assert stream.answers[0].straddling == 0


def test_token_that_holds_prompt_and_answer_is_context(text_encoder):
    """'circle' from "cir" + "cle" would be one token: no position predicts the answer's part alone."""
    stream = text_encoder.encode(Conversation(turns("the qui", "ck brown fox"), templated=False))
    answer = stream.answers[0]
    decoded = text_encoder.tokenizer.convert_ids_to_tokens(stream.input_ids_T.tolist())
    assert (
        answer.straddling == 1 and decoded[answer.tokens[0] - 1] == "Ġquick" and decoded[answer.tokens[0]] == "Ġbrown"
    )


def test_special_token_of_the_next_turn_is_no_end(text_encoder):
    """A template that ends turns with a newline alone: the next turn's start is not the end of this one."""
    encoder = template(text_encoder, CHAT_TEMPLATE.replace("'<|im_end|>\n'", "'\n'"))
    assert [answer.end_of_turn for answer in encoder.encode(Conversation(turns("a", "yes", "b", "no"))).answers] == [
        None
    ] * 2


def test_processor_that_hides_its_image_tokens_is_refused(folders):
    """Without replacement offsets the answers would be looked for in the wrong place."""
    processor = load_processor(folders["llava"])

    class Silent(type(processor)):
        def get_text_with_replacements(self, *args, **kwargs):
            texts, replaced = super().get_text_with_replacements(*args, **kwargs)
            return texts, [[] for _ in replaced]

    processor.__class__ = Silent
    with pytest.raises(InputError, match="does not tell how it expands images"):
        StreamEncoder(processor)


def test_plain_text_is_all_answer(text_encoder):
    stream = text_encoder.encode(Conversation((Turn("assistant", (Part("the quick fox"),)),), templated=False))
    assert stream.text == "the quick fox<|im_end|>"
    answer = stream.answers[0]
    assert (
        answer.tokens == list(range(len(stream.input_ids_T) - 1)) and answer.end_of_turn == len(stream.input_ids_T) - 1
    )


def test_plain_prompt_and_completion(text_encoder):
    stream = text_encoder.encode(Conversation(turns("the quick", " brown fox"), templated=False))
    assert stream.text == "the quick brown fox<|im_end|>"
    assert supervised(text_encoder, stream) == [(" brown fox", "<|im_end|>")]


def test_special_tokens_are_written_once(text_encoder):
    """The template writes what a tokenizer would add: no second begin of text."""
    stream = text_encoder.encode(Conversation(turns("hello", "yes")))
    assert stream.input_ids_T.tolist().count(text_encoder.tokenizer.bos_token_id) == 2  # one a turn


def test_rows_that_do_not_fit(folders, text_encoder):
    encoder = StreamEncoder(load_processor(folders["llava"]), DataOptions(train=[], max_length=30))
    rows = [
        Conversation(turns("hello", "yes", image=True), row="good"),
        Conversation(turns("is there a red circle in the image? " * 3, "yes", image=True), row="long"),
        Conversation(turns("<image> and <image>", "yes", image=True), row="marks"),
    ]
    assert encoder.encode_batch(rows[:2]).refused.keys() == {1}
    assert "max_length" in encoder.encode_batch(rows[:2]).refused[1].reason
    refused = encoder.encode_batch(rows).refused
    assert 2 in refused and 0 not in refused
    with pytest.raises(BadRow, match="text alone"):
        text_encoder.encode(rows[0])


def test_same_processing(folders, tmp_path):
    llava = StreamEncoder(load_processor(folders["llava"]))
    again = StreamEncoder(load_processor(folders["llava"]))
    larger = StreamEncoder(load_processor(families.llava(tmp_path / "larger", image=48)))
    assert same_processing(llava, again)
    assert not same_processing(llava, larger)
    again.renderer.template = CHAT_TEMPLATE.replace("'<|im_end|>\n'", "'<|im_end|>'")
    assert not same_processing(llava, again)
    limited = StreamEncoder(load_processor(folders["llava"]), DataOptions(train=[], max_length=3))
    assert not same_processing(limited, larger)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_its_own_answer(folders, family):
    """Changing the last answer token moves no earlier logit."""
    encoder = StreamEncoder(load_processor(folders[family]))
    model = load_model(ModelOptions(folders[family])).eval()
    batch = encoder.encode_batch([Conversation(turns("what is it?", "a red circle", image=encoder.takes_images))])
    last = batch.streams[0].answers[0].tokens[-1]
    changed = {key: value.clone() for key, value in batch.inputs.items()}
    changed["input_ids"][0, last] += 1
    with torch.no_grad():
        before, after = model(**batch.inputs).logits, model(**changed).logits
    assert torch.equal(before[0, :last], after[0, :last])
    assert not torch.equal(before[0, last], after[0, last])
