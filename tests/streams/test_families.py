"""The encoder on every family: the same inputs as the processor's own call, and the answers where the template put
them. Oracles: the processor's own ``apply_chat_template(tokenize=True)``, and the known pieces round an answer."""

import pytest
import torch
from PIL import Image

from tests import families
from tests.families import FAMILIES, MORE_IMAGE_TOKENS, TEXT_ONLY, templates
from vlm_taid.data import Conversation, DataOptions, Part, Turn
from vlm_taid.errors import BadRow
from vlm_taid.pretrained import load_processor
from vlm_taid.streams import StreamEncoder

WIDE = Image.linear_gradient("L").resize((96, 40)).convert("RGB")
TALL = Image.radial_gradient("L").resize((40, 60)).convert("RGB")
VISUAL = [name for name in FAMILIES if name not in TEXT_ONLY]

# what each family writes before an answer, and the token that ends it
CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
THOUGHT = ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")
IDEFICS = ("Assistant:", "<end_of_utterance>")
GEMMA = ("<start_of_turn>model\n", "<end_of_turn>")
PIECES = {
    "llava": ("ASSISTANT:", "</s>"), "llava_next": ("[/INST]", "</s>"),
    "llava_onevision": ("<|im_start|>assistant \n", "<|im_end|>"), "qwen2_vl": CHATML, "qwen2_5_vl": CHATML,
    "qwen3_vl": CHATML, "qwen3_5": THOUGHT, "internvl": CHATML, "smolvlm": IDEFICS, "idefics3": IDEFICS,
    "gemma3": GEMMA, "paligemma": ("\n", "<eos>"), "pixtral": ("[/INST]", "</s>"), "mistral3": ("[/INST]", "</s>"),
    "fast_vlm": CHATML, "perception_lm": LLAMA3, "llama3": LLAMA3, "qwen2": CHATML, "qwen3": THOUGHT,
    "gemma2": GEMMA, "phi3": ("<|assistant|>\n", "<|end|>"),
}  # fmt: skip


def conversation(*turns, row="row", system=None):
    """Users and assistants in turns, a text or a list of texts and pictures each."""
    roles = ["user", "assistant"] * len(turns)
    contents = [[turn] if isinstance(turn, str) else turn for turn in turns]
    parts = [tuple(Part(p) if isinstance(p, str) else Part(image=p) for p in content) for content in contents]
    made = [Turn(role, part) for role, part in zip(roles, parts, strict=False)]  # pyright: ignore[reportArgumentType]
    return Conversation((*([Turn("system", (Part(system),))] if system else []), *made), row=row)


LAYOUTS = {
    "no image": conversation("is it red?", "no"),
    "one image": conversation([WIDE, "what is it?"], "a red circle"),
    "two images in a turn": conversation([WIDE, TALL, "which one is red?"], "the tall one\nof the two"),
    "interleaved": conversation(["here is one: ", WIDE, " and here another: ", TALL, " which?"], "the 2nd, é😀 中文"),
    "images over turns": conversation([WIDE, "what?"], "a square", [TALL, "and this?"], "a circle", "sure?", "yes"),
    "image in a late turn": conversation("hello", "yes?", [TALL, "what is it?"], "red"),
    "system turn": conversation([WIDE, "what?"], "a square", "sure?\n", "yes, it is", system="Answer in short."),
}
ONE_ANSWER = "PaliGemma takes one question and one answer"
REFUSED = {("paligemma", layout): ONE_ANSWER for layout in LAYOUTS if "turn" in layout and "a turn" not in layout}
REFUSED["paligemma", "image in a late turn"] = ONE_ANSWER
REFUSED["gemma2", "system turn"] = "System role not supported"


@pytest.fixture(scope="module")
def encoders():
    return {name: StreamEncoder(load_processor(families.made(name))) for name in FAMILIES}


def rows_of(encoder):
    """The layouts that the family's kind can hold."""
    return {name: row for name, row in LAYOUTS.items() if encoder.takes_images or not row.images}


def inputs_of_its_own_call(encoder, row):
    """What the processor makes of a row by itself, as its users call it."""
    if type(encoder.processor).__name__ == "PaliGemmaProcessor":
        question, answer = row.turns[0].text, row.turns[1].text
        if not row.images:  # its own call takes none
            joined = encoder.tokenizer(f"<bos>{question}\n{answer}<eos>", add_special_tokens=False, return_tensors="pt")
            return dict(joined)
        marked = "<image>" * len(row.images) + question
        own = encoder.processor(images=[row.images], text=[marked], suffix=[answer], return_tensors="pt",
                                add_special_tokens=False)  # fmt: skip
        return {key: value for key, value in own.items() if key != "labels"}
    messages, images = row.messages(structured=encoder.takes_images), iter(row.images)
    if encoder.takes_images:
        for part in (part for turn in messages for part in turn["content"] if part["type"] == "image"):
            part["image"] = next(images)
    return dict(encoder.processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_processors_own_call(encoders, family):
    """Ids (begin of text included), pixels, masks and grids, of every layout."""
    encoder = encoders[family]
    for name, row in rows_of(encoder).items():
        if (family, name) in REFUSED:
            continue
        batch, own = encoder.encode_batch([row]), inputs_of_its_own_call(encoder, row)
        assert batch.inputs.keys() - {"token_type_ids"} == own.keys() - {"token_type_ids"}, name
        for key, value in own.items():
            assert torch.equal(batch.inputs[key].reshape(value.shape), value), (name, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_those_of_the_streams(encoders, family, monkeypatch):
    """The second row with pictures of the same sizes is measured without the processor."""
    encoder = encoders[family]
    for name, row in rows_of(encoder).items():
        said = Turn("assistant", (Part("  another answer,\nwith 中文 "),))
        other = Conversation((*row.turns[:-1], said), row="other")
        if (family, name) in REFUSED:
            assert encoder.length(row) == encoder.length(other) == 0
            continue
        lengths = [len(encoder.encode(one).input_ids_T) for one in (row, other)]
        assert encoder.length(row) == lengths[0], name
        with monkeypatch.context() as without:
            without.setattr(encoder, "encode_batch", None)
            assert encoder.length(other) == lengths[1] != lengths[0], name
            without.setattr(encoder, "max_length", lengths[1] - 1)
            assert encoder.length(other) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_found_in_every_layout(encoders, family):
    encoder, (before, end) = encoders[family], PIECES[family]
    decode = encoder.tokenizer.decode
    good = {name: row for name, row in rows_of(encoder).items() if (family, name) not in REFUSED}
    batch = encoder.encode_batch(list(good.values()))
    assert not batch.refused
    for (name, row), stream in zip(good.items(), batch.streams, strict=True):
        texts = [turn.text for turn in row.turns if turn.role == "assistant"]
        assert [answer.text for answer in stream.answers] == texts, name
        for place, (answer, text) in enumerate(zip(stream.answers, texts, strict=True)):
            first, last = answer.tokens[0], answer.tokens[-1]
            assert answer.tokens == list(range(first, last + 1)) and answer.straddling == 0
            assert decode(stream.input_ids_T[first : last + 1]).lstrip(" ") == text, name
            opening = CHATML[0] if before is THOUGHT[0] and place < len(texts) - 1 else before
            assert decode(stream.input_ids_T[:first]).removesuffix(" ").endswith(opening), name
            assert answer.end_of_turn == last + 1 and decode(stream.input_ids_T[last + 1]) == end, name
        alone = encoder.encode(row)
        assert torch.equal(alone.input_ids_T, stream.input_ids_T) and alone.answers == stream.answers, name


@pytest.mark.parametrize(("family", "layout"), REFUSED)
def test_layout_that_a_template_does_not_take_is_refused(encoders, family, layout):
    """With the template's own words, and the good rows of the batch beside it are not."""
    odd = "no image" if family == "gemma2" else "one image"
    row = Conversation(LAYOUTS[layout].turns, row="rows.jsonl:3")
    if family == "gemma2":  # keeps the text alone
        row = conversation("what?", "a square", system="Answer in short.", row="rows.jsonl:3")
    refused = encoders[family].encode_batch([LAYOUTS[odd], row]).refused
    assert refused.keys() == {1} and REFUSED[family, layout] in str(refused[1]) and "rows.jsonl:3" in str(refused[1])


@pytest.mark.parametrize("family", VISUAL)
def test_more_image_tokens_change_the_images_alone(encoders, family):
    """Other pixel limits, tiles or pooling: the same text, another number of tokens, the answers still there."""
    other = StreamEncoder(load_processor(families.made(family, **MORE_IMAGE_TOKENS[family])))
    for name in ("one image", "two images in a turn"):
        here, there = encoders[family].encode(LAYOUTS[name]), other.encode(LAYOUTS[name])
        assert len(here.input_ids_T) != len(there.input_ids_T)
        assert [answer.text for answer in here.answers] == [answer.text for answer in there.answers]
        tails = [s.input_ids_T[s.answers[0].tokens[0] :] for s in (here, there)]
        assert torch.equal(*tails)


@pytest.mark.parametrize("family", VISUAL)
def test_marks_and_images_must_agree(encoders, family):
    """More marks than images, and fewer: said of the row that is at fault, whatever its neighbours hold."""
    encoder = encoders[family]
    mark = encoder.processor.image_token
    surplus = [conversation([WIDE, f"{mark} what?"], "no", row="more"), conversation(f"a {mark}?", "no", row="none")]
    refused = encoder.encode_batch([LAYOUTS["one image"], *surplus]).refused
    assert refused.keys() == {1, 2}
    assert f"2 image marks ({mark}) and 1 images" in str(refused[1]) and "1 image marks" in str(refused[2])
    blind = StreamEncoder(load_processor(families.made(family)))
    blind.renderer.template = blind.renderer.template.replace(f"'{mark}'", "''").replace(mark, "")  # pyright: ignore
    # two rows whose surplus and lack would even out over the batch
    refused = blind.encode_batch([LAYOUTS["one image"], surplus[1]]).refused
    assert refused.keys() == {0, 1} and "0 image marks" in str(refused[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_length_counts_image_tokens_and_nothing_is_cut(encoders, family):
    encoder = encoders[family]
    row = LAYOUTS["one image" if encoder.takes_images else "no image"]
    length = len(encoder.encode(row).input_ids_T)
    processor = load_processor(families.made(family))
    assert StreamEncoder(processor, DataOptions(train=[], max_length=length)).encode(row)
    with pytest.raises(BadRow, match=f"{length} tokens, more than data.max_length = {length - 1}"):
        StreamEncoder(processor, DataOptions(train=[], max_length=length - 1)).encode(row)


THINKING = "<think>\nred, I think\n</think>\n\na red circle"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_thoughts(encoders, family):
    """The template strips the thoughts of earlier answers: such rows are learned from their last answer alone."""
    encoder = encoders[family]
    last = StreamEncoder(load_processor(families.made(family)), DataOptions(train=[], answers="last"))
    one, two = conversation("what?", THINKING), conversation("what?", THINKING, "sure?", THINKING)
    for made_by in (encoder, last):
        stream = made_by.encode(one)
        assert stream.answers[0].text == THINKING and stream.text.endswith(CHATML[0] + THINKING + "<|im_end|>\n")
    with pytest.raises(BadRow, match=r"rewrites answer 1 .*set data.answers: last"):
        encoder.encode(two)
    stream = last.encode(two)
    assert [answer.text for answer in stream.answers] == [THINKING]
    assert stream.text.count("<think>") == 1 and stream.text.count("a red circle<|im_end|>") == 2
    with pytest.raises(BadRow, match=r"rewrites answer 1 to '<think>\\nred\\n</think>.*in the template's form"):
        encoder.encode(conversation("what?", "<think>red</think>circle"))


@pytest.mark.parametrize("family", FAMILIES)
def test_last_answer_alone(encoders, family):
    last = StreamEncoder(load_processor(families.made(family)), DataOptions(train=[], answers="last"))
    row = LAYOUTS["no image"] if family == "paligemma" else conversation("what?", "a square", "sure?", "yes")
    stream, both = last.encode(row), encoders[family].encode(row)
    assert torch.equal(stream.input_ids_T, both.input_ids_T) and stream.answers == both.answers[-1:]


def test_generation_marks_agree(encoders):
    """LLaVA's published template marks its answers: the same tokens are found without the marks."""
    encoder, row = encoders["llava"], LAYOUTS["images over turns"]
    messages = [dict(turn, content=[part for part in turn["content"] if part["type"] == "text"]) for turn in
                row.messages()]  # fmt: skip
    own = encoder.processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    stream = encoder.encode(Conversation(tuple(Turn(turn.role, (Part(turn.text),)) for turn in row.turns)))
    found = [i for answer in stream.answers for i in [*answer.tokens, answer.end_of_turn]]
    assert torch.equal(own["input_ids"][0], stream.input_ids_T)
    assert own["assistant_masks"][0].nonzero().flatten().tolist() == found


def test_begin_of_text_is_the_tokenizers_where_a_processors_template_writes_none(encoders):
    for family in ("llava", "llava_next"):
        assert encoders[family].encode(LAYOUTS["one image"]).text.startswith("<s>")
    # of a tokenizer's template it is not: apply_chat_template(tokenize=True) of a tokenizer adds none
    assert encoders["phi3"].encode(LAYOUTS["no image"]).text.startswith("<|user|>")


def test_default_system_turn_is_context(encoders):
    stream = encoders["qwen2"].encode(LAYOUTS["no image"])
    assert stream.text.startswith(f"<|im_start|>system\n{templates.ASSISTANT}<|im_end|>\n<|im_start|>user\n")
