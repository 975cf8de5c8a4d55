"""What must pair in two streams, found from the known pieces of the families' templates and by nothing under test.

An answer stands before its end token, after a known opening; its tokens' bytes, counted backwards from the end token,
tell where each of them begins. Positions pair where both streams have a beginning at the same byte.
"""

from __future__ import annotations

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlm_taid.data import Conversation

CHATML = (["<|im_start|>assistant\n"], "<|im_end|>")
THINKING = (["<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n"], "<|im_end|>")
PIECES = {  # what stands before an answer, and the token that ends it
    "llava": (["ASSISTANT: "], "</s>"),
    "llava_next": (["[/INST] "], "</s>"),
    "llava_onevision": (["<|im_start|>assistant \n"], "<|im_end|>"),
    "qwen2_vl": CHATML,
    "qwen2_5_vl": CHATML,
    "qwen3_vl": CHATML,
    "qwen3_5": THINKING,
    "internvl": CHATML,
    "smolvlm": (["Assistant: "], "<end_of_utterance>"),
    "idefics3": (["Assistant: "], "<end_of_utterance>"),
    "gemma3": (["<start_of_turn>model\n"], "<end_of_turn>"),
    "pixtral": (["[/INST]"], "</s>"),
    "mistral3": (["[/INST]"], "</s>"),
    "fast_vlm": CHATML,
    "perception_lm": (["<|start_header_id|>assistant<|end_header_id|>\n\n"], "<|eot_id|>"),
    "llama3": (["<|start_header_id|>assistant<|end_header_id|>\n\n"], "<|eot_id|>"),
    "qwen2": CHATML,
    "qwen3": THINKING,
    "gemma2": (["<start_of_turn>model\n"], "<end_of_turn>"),
    "phi3": (["<|assistant|>\n"], "<|end|>"),
    "paligemma": (["\n"], "<eos>"),
}
ADDS_BOS = ("llava", "llava_next")  # their templates leave the begin of text to the tokenizer
BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


class Side:
    """One model's half of a pair: its family's known pieces, its processor, its kind of tokenizer."""

    def __init__(self, family: str, processor, sentencepiece: bool = False):
        self.family = family
        self.openings, self.end = PIECES[family]
        self.processor, self.adds_bos = processor, family in ADDS_BOS
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.end_id = self.tokenizer.convert_tokens_to_ids(self.end)
        self.sentencepiece = sentencepiece
        self.literal = set(self.tokenizer.get_added_vocab().values())

    def bytes_of(self, token_id: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self.literal:
            return token.encode()
        if not self.sentencepiece:
            return bytes(BYTES[character] for character in token)
        if token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def answers(self, row: Conversation, ids: list[int]) -> list[tuple[dict[int, int], int]]:
        """Each answer's beginnings, byte of the stripped answer -> token, and its end token."""
        found, before = [], 0
        for turn in row.turns:
            if turn.role == "assistant":
                starts, before = self._answer(turn.text, ids, before)
                found.append((starts, before))
        return found

    def _answer(self, text: str, ids: list[int], before: int) -> tuple[dict[int, int], int]:
        forms = dict.fromkeys((text, text.strip(), text.lstrip("\n")))
        texts = [(o + blank + form, form) for o in self.openings for blank in ("", " ") for form in forms]
        for end in (i for i in range(before + 1, len(ids)) if ids[i] == self.end_id):
            pieces = [self.bytes_of(i) for i in ids[before:end]]
            joined = b"".join(pieces)
            for whole, form in texts:
                if joined.endswith(whole.encode()):
                    return self._starts(form, pieces, end), end
        raise AssertionError(f"no answer {text!r} in {self.tokenizer.decode(ids)!r}")

    def _starts(self, form: str, pieces: list[bytes], end: int) -> dict[int, int]:
        starts, at = {}, len(form.encode())
        lead = at - len(form.lstrip().encode())
        for back, piece in enumerate(reversed(pieces), start=1):
            at -= len(piece)
            if at >= 0 or (at + len(piece) > 0 and piece[:-at].isspace()):
                starts[at - lead] = end - back
            if at <= 0:
                return starts
        raise AssertionError("an answer that begins before the row")


def pairs_of(row: Conversation, student: Side, teacher: Side, my_ids: list[int], their_ids: list[int]):
    """(predicting position of the student, of the teacher, the student's next id), in any order."""
    expected = set()
    for (mine, my_end), (theirs, their_end) in zip(
        student.answers(row, my_ids), teacher.answers(row, their_ids), strict=True
    ):
        places = [(mine[b], theirs[b]) for b in mine.keys() & theirs.keys()] + [(my_end, their_end)]
        expected |= {(i - 1, j - 1, my_ids[i]) for i, j in places}
    return expected


def check_positions(batch, rows: list[Conversation], student: Side, teacher: Side) -> None:
    """The batch's positions and labels are those that must pair, no more and no fewer.

    Raises:
        AssertionError: naming the row.
    """
    ids = {name: batch[name]["input_ids"] for name in ("student", "teacher")}
    lengths = {name: batch[name]["attention_mask"].sum(-1).tolist() for name in ids}
    widths = {name: ids[name].shape[1] for name in ids}
    got: dict[int, set] = {place: set() for place in range(len(rows))}
    for place, i, j, label in zip(
        *(batch[key].tolist() for key in ("row_of_N", "student_rows_N", "teacher_rows_N", "labels_N")), strict=True
    ):
        assert i // widths["student"] == j // widths["teacher"] == place, f"row {place}: positions of another row"
        got[place].add((i % widths["student"], j % widths["teacher"], label))
    assert sum(map(len, got.values())) == len(batch["labels_N"]), "a pair twice"
    for place, row in enumerate(rows):
        mine, theirs = (ids[name][place, : lengths[name][place]].tolist() for name in ids)
        expected = pairs_of(row, student, teacher, mine, theirs)
        assert got[place] == expected, f"{row.row}: {sorted(got[place] ^ expected)}"


def check_pictures(batch, rows: list[Conversation], student: Side, teacher: Side) -> None:
    """Each model's ids and pixels are what its processor makes of each row alone.

    Raises:
        AssertionError: a row's ids differ, or the pixels.
    """
    for name, side in (("student", student), ("teacher", teacher)):
        inputs, pixels = batch[name], []
        for place, row in enumerate(rows):
            alone = _alone(side, row)
            length = int(inputs["attention_mask"][place].sum())
            assert alone["input_ids"][0].tolist() == inputs["input_ids"][place, :length].tolist(), row.row
            if "token_type_ids" in alone:  # what of the row sees itself whole
                assert alone["token_type_ids"][0].tolist() == inputs["token_type_ids"][place, :length].tolist(), row.row
            if "pixel_values" in alone:
                pixels.append(alone["pixel_values"])
        if pixels:
            together = torch.cat([_content(tensor) for tensor in pixels])
            assert torch.equal(together, _content(inputs["pixel_values"])), f"the {name} sees other pictures"


def _alone(side: Side, row: Conversation):
    """A row as its model's own processor makes it."""
    options: dict = {"images": [row.images]} if row.images else {}
    if side.family == "paligemma":  # no template; question and answer have arguments of their own
        question, answer = (turn.text for turn in row.turns)
        if row.images:
            question = "<image>" * len(row.images) + question
            return side.processor(text=[question], suffix=[answer], return_tensors="pt", **options)
        text = f"<bos>{question}\n{answer}<eos>"  # which that call refuses without a picture
        return side.tokenizer([text], add_special_tokens=False, return_tensors="pt")
    structured = side.processor is not side.tokenizer
    text = side.processor.apply_chat_template(row.messages(structured), tokenize=False)
    return side.processor(text=[text], add_special_tokens=side.adds_bos, return_tensors="pt", **options)


def _content(pixels: torch.Tensor) -> torch.Tensor:
    """All values but the zeros of padding, in order."""
    return pixels.flatten()[pixels.flatten() != 0]
