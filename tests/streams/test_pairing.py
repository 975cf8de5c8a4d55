"""Two streams of one conversation pair at the answers' tokens; the vocabulary is shared by token and role."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import families
from tests.streams.test_encoder import turns
from vlm_taid.data import Conversation, ConversationDataset, DataOptions, SourceOptions
from vlm_taid.errors import BadRow, InputError
from vlm_taid.objectives import Head, HiddenSignal, Objective, linear_distillation
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.streams import PairedCollator, SharedVocabulary, StreamEncoder, align
from vlm_taid.students import CHAT_TEMPLATE

PICTURE = Image.new("RGB", (64, 64), (200, 30, 30))
ANSWERS = ["red", "a red circle", "yes", "é😀 fox", "The quick brown fox jumps", "a\nb"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {
        "small": families.llava(root / "small"),
        "large": families.llava(root / "large", image=64, seed=0),
        "qwen": families.qwen2_5_vl(root / "qwen"),
        "text": families.llama(root / "text"),
    }


def encoder(folders, name, template=None):
    processor = load_processor(folders[name])
    if template is not None:
        processor.chat_template = template
    return StreamEncoder(processor)


def paired_texts(student, teacher, row, minimum=0.5):
    """What each paired position predicts, as text: (student's next token, teacher's next token)."""
    mine, theirs = student.encode(row), teacher.encode(row)
    pairs = align(mine, theirs, SharedVocabulary(student, teacher), min_paired_share=minimum)
    my_text = student.tokenizer.convert_ids_to_tokens(mine.input_ids_T[1:][pairs.student_positions_N].tolist())
    their_text = teacher.tokenizer.convert_ids_to_tokens(theirs.input_ids_T[1:][pairs.teacher_positions_N].tolist())
    return pairs, my_text, their_text


TEMPLATES = {
    "same": CHAT_TEMPLATE,
    "system first": "<|im_start|>system\nAnswer with one word.<|im_end|>\n" + CHAT_TEMPLATE,
    "no newline after the end": CHAT_TEMPLATE.replace("'<|im_end|>\n'", "'<|im_end|>'"),
    "another end of turn": CHAT_TEMPLATE.replace("'<|im_end|>\n'", "'<|pad|>\n'"),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("teacher", ["small", "large", "qwen"])
def test_pairs_predict_the_same_text(folders, teacher, template):
    student = encoder(folders, "small")
    mark = "<|vision_start|><|image_pad|><|vision_end|>" if teacher == "qwen" else "<image>"
    other = encoder(folders, teacher, TEMPLATES[template].replace("<image>", mark))
    for answer in ANSWERS:
        row = Conversation(turns("what is it?", answer, "again?", answer, image=True))
        pairs, mine, theirs = paired_texts(student, other, row)
        ends = [("<|im_end|>", "<|pad|>" if template == "another end of turn" else "<|im_end|>")] * 2
        assert [p for p in zip(mine, theirs, strict=True) if p[0] == "<|im_end|>"] == ends
        assert [token for token in mine if token != "<|im_end|>"] == [token for token in theirs if token not in ends[0]]
        expected = student.tokenizer(answer, add_special_tokens=False).input_ids
        assert len(mine) == 2 * (len(expected) + 1)
        assert (pairs.content_share, pairs.identical_next_share, pairs.first_unpaired) == (1.0, 1.0, 0)


def test_leading_blank_costs_the_first_token(folders):
    """'Ġred' and 'red' are other tokens: the first token cannot pair, and that is counted."""
    student = encoder(folders, "text")
    blank = CHAT_TEMPLATE.replace("+ message['role'] + '\n'", "+ message['role'] + ':'").replace(
        "{{- message['content'] -}}", "{{- ' ' + message['content'] -}}"
    )
    teacher = encoder(folders, "text", blank)
    row = Conversation(turns("what?", "red circle, a blue square"))
    pairs, mine, theirs = paired_texts(student, teacher, row)
    assert pairs.first_unpaired == 1 and pairs.content_share < 1.0
    assert mine == theirs and mine[-1] == "<|im_end|>" and "red" not in mine[0].strip("Ġ")


def test_other_texts_are_refused(folders):
    student, teacher = encoder(folders, "text"), encoder(folders, "text")
    mine = student.encode(Conversation(turns("what?", "yes"), row="f.jsonl:3"))
    theirs = teacher.encode(Conversation(turns("what?", "no"), row="f.jsonl:3"))
    with pytest.raises(BadRow, match=r"f\.jsonl:3: answer 1 differs.*'yes'.*'no'"):
        align(mine, theirs, SharedVocabulary(student, teacher))


def test_leading_blank_that_one_template_strips(folders):
    """' ab' is [' ', 'ab'], 'ab' is ['a', 'b']: the same places, other text. Nothing but the boundaries pairs."""
    stripping = CHAT_TEMPLATE.replace("{{- message['content'] -}}", "{{- message['content'] | trim -}}")
    student, teacher = encoder(folders, "text"), encoder(folders, "text", stripping)
    row = Conversation(turns("what?", " zq red circle"))
    _, mine, theirs = paired_texts(student, teacher, row)
    assert mine[-2:] == theirs[-2:] == ["Ġcircle", "<|im_end|>"]
    assert all(a == b or a.strip("Ġ") == b for a, b in zip(mine, theirs, strict=True))


def test_vocabulary_is_by_token_not_by_size(folders, tmp_path):
    """Same size, other order of ids: columns follow the tokens."""
    student = encoder(folders, "text")
    for file in Path(folders["text"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    a, b = vocab["a"], vocab["b"]
    vocab["a"], vocab["b"] = b, a
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    teacher = StreamEncoder(load_processor(tmp_path))
    shared = SharedVocabulary(student, teacher)
    assert len(shared) == len(vocab) and shared.to_teacher[a] == b and shared.to_teacher[b] == a
    assert shared.to_teacher[a + 30] == a + 30
    with pytest.raises(InputError, match=r"student's tokenizer.*resize_token_embeddings"):
        shared.check_fits(100, 1000)


def test_end_of_turn_is_shared_by_role(folders):
    student = encoder(folders, "text")
    teacher = encoder(folders, "text", TEMPLATES["another end of turn"])
    shared = SharedVocabulary(student, teacher)
    end, pad = student.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    assert shared.end_of_turn == (end, pad) and shared.to_teacher[end] == pad
    assert pad not in shared.to_teacher and end not in shared.to_teacher.values()


def collator(folders, teacher=None, **options):
    student = encoder(folders, "small")
    if teacher is None:
        return PairedCollator(student, options=DataOptions(train=[], **options))
    other = encoder(folders, teacher)
    return PairedCollator(student, other, SharedVocabulary(student, other), DataOptions(train=[], **options))


def test_batch_rows_point_at_the_predicting_positions(folders):
    collate = collator(folders, "qwen")
    rows = [Conversation(turns("what is it?", answer, image=True), row=str(i)) for i, answer in enumerate(ANSWERS)]
    batch = collate(rows)
    for name in ("student", "teacher"):
        ids = batch[name]["input_ids"]
        following = torch.roll(ids, -1, dims=1).flatten()[batch[f"{name}_rows_N"]]
        end = batch["labels_N"] == collate.vocabulary.end_of_turn[0]
        assert torch.equal(following[~end], batch["labels_N"][~end])
        assert int(end.sum()) == len(ANSWERS)
    assert batch["row_of_N"].unique().tolist() == list(range(len(ANSWERS)))


def test_batch_without_picture_gets_one_without_answers(folders):
    collate = collator(folders, "large")
    batch = collate([Conversation(turns("is it?", "yes"), row="0")])
    assert batch["student"]["input_ids"].shape[0] == 2 and batch["num_rows"] == 1
    assert batch["student"]["pixel_values"].shape[0] == batch["teacher"]["pixel_values"].shape[0] == 1
    assert batch["row_of_N"].tolist() == [0] * len(batch["labels_N"])


def test_refused_rows_keep_the_others_places(folders):
    rows = [
        Conversation(turns("what?", "red", image=True), row="0"),
        BadRow("1", "broken"),
        Conversation(turns("<image>", "red", image=True), row="2"),
        Conversation(turns("what?", "blue", image=True), row="3"),
    ]
    batch = collator(folders, on_bad_row="skip")(rows)
    assert batch["num_rows"] == 4 and batch["row_of_N"].unique().tolist() == [0, 3]
    assert len(batch["refused"]) == 2 and batch["teacher"] is None
    with pytest.raises(BadRow, match=r"^2: "):
        collator(folders)([rows[0], rows[2]])
    empty = collator(folders, on_bad_row="skip")([rows[1]])
    assert len(empty["labels_N"]) == 0 and empty["student"]["input_ids"].shape[0] == 1


def test_shared_batch_moves_as_one(folders):
    student = encoder(folders, "small")
    batch = PairedCollator(student, student, SharedVocabulary(student, student))(
        [Conversation(turns("what?", "red", image=True))]
    )
    assert batch["teacher"] is batch["student"]
    moved = batch.to("cpu")
    assert moved["teacher"] is moved["student"]


def test_positions_off_by_one_show(folders, tmp_path):
    """A copy of the student that sees no picture (projector zeroed) through other image-token counts is its own
    teacher: the KL is small at the paired tokens, and not when positions are shifted by one."""
    paths = {name: folders[name] for name in ("small", "large")}
    student = load_model(ModelOptions(paths["small"])).eval()
    teacher = load_model(ModelOptions(paths["large"])).eval()
    teacher.model.language_model.load_state_dict(student.model.language_model.state_dict())
    teacher.lm_head.load_state_dict(student.lm_head.state_dict())
    with torch.no_grad():  # images as zeros, text positions apart: compare by content alone
        for model in (student, teacher):
            model.model.multi_modal_projector.linear_2.weight.zero_()
            model.model.multi_modal_projector.linear_2.bias.zero_()
    data = families.vqa_rows(tmp_path, rows=8)
    rows = ConversationDataset([SourceOptions(data, "vqa")])
    batch = collator(folders, "large")([rows[i] for i in range(8)])
    assert batch["student"]["input_ids"].shape[1] != batch["teacher"]["input_ids"].shape[1]

    def kl(shift):
        with torch.no_grad():
            mine = student.base_model(**batch["student"]).last_hidden_state.flatten(0, 1)[batch["student_rows_N"]]
            theirs = teacher.base_model(**batch["teacher"]).last_hidden_state.flatten(0, 1)[
                batch["teacher_rows_N"] + shift
            ]
            target = HiddenSignal(theirs, Head.of(teacher))
            return linear_distillation(mine, Head.of(student), target, Objective.named("fkl")).kl_N.mean()

    assert kl(0) < 0.5 * kl(1) and kl(0) < 0.5 * kl(-1)  # 12 more image tokens take some attention
