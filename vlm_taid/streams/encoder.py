"""StreamEncoder: a conversation becomes the token stream of one model, with its answers found in it.

Answers are found in the rendered text, not in tokens: the conversation is rendered once with sentinels in place of
the answers and once for real; what stands between the fixed pieces is the answer. The processor's offsets then give
the tokens, however many tokens an image takes.

Legend: B rows, T positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import Conversation, DataOptions, Part, Turn
from ..errors import BadRow, InputError
from .answers import Answer, find_answers
from .token_bytes import TokenBytes

SENTINEL = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Stream:
    """A row as one model reads it: rendered text, ids, answers."""

    row: str
    text: str
    input_ids_T: Tensor
    answers: list[Answer]


@dataclass
class EncodedBatch:
    """Streams, and the padded inputs of the model (``input_ids`` [B, T], pixels, ...).

    ``refused`` holds the rows that cannot be encoded, by index; if there are any, nothing else is filled.
    """

    streams: list[Stream] = field(default_factory=list)
    inputs: dict[str, Any] = field(default_factory=dict)
    refused: dict[int, BadRow] = field(default_factory=dict)


class StreamEncoder:
    """Encodes conversations for one model.

    Args:
        processor: a transformers processor, or a fast tokenizer for text-only models, with a chat template.
        options: DataOptions; ``max_length`` is used.

    Raises:
        InputError: the tokenizer has no offsets, or a proof fails: the answers found in two made-up rows must be
            the ones that were put in.
    """

    def __init__(self, processor: Any, options: DataOptions | None = None):
        self.processor = processor
        self.max_length = (options or DataOptions(train=[])).max_length
        self.tokenizer = getattr(processor, "tokenizer", processor)
        name = type(self.tokenizer).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(f"{name} has no offsets: a fast tokenizer (tokenizer.json) is needed to find the answers")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masks come from lengths, so any id will do
        self.takes_images = getattr(processor, "image_processor", None) is not None
        # a processor's template reads content as parts, a tokenizer's as one string
        self.renderer = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self.token_bytes = TokenBytes(self.tokenizer)
        picture = (Part(image=Image.new("RGB", (64, 64), (128, 128, 128))),) if self.takes_images else ()
        templated = self.renderer.chat_template is not None
        turns = (Turn("user", (*picture, Part("Hello"))), Turn("assistant", (Part("Hello"),)))
        self.filler = Conversation(turns, row="the filler row", templated=templated)
        """A short row with a picture, if the model takes any: what fills a batch that would have none."""
        first = self.tokenizer("a").input_ids[:1]
        self.bos = self.tokenizer.bos_token if first == [self.tokenizer.bos_token_id] else ""
        image_id = getattr(processor, "image_token_id", None)
        self._ends = {
            i for i in self.token_bytes.special if i != image_id
        }  # narrowed to the one token that ends answers
        end = self._proven(self.filler)
        self._ends = set() if end is None else {end}
        if templated:
            self._proven(Conversation((*turns, *turns), row="the two-turn row"))

    def _proven(self, row: Conversation) -> int | None:
        """The id that ends the row's last answer, if any, after a check that its answers are found as they are."""
        stream = self.without_limit([row]).streams[0]
        for answer in stream.answers:
            found = self.tokenizer.decode(stream.input_ids_T[answer.tokens])
            if found.strip() != answer.text.strip():
                raise InputError(
                    f"{type(self.processor).__name__}: in {row.row} the answer {answer.text!r} was found as {found!r}, "
                    "so rows cannot be supervised: the processor does not tell how it expands images, or the tokenizer "
                    "cannot write the answer"
                )
        last = stream.answers[-1].end_of_turn
        return None if last is None else int(stream.input_ids_T[last])

    @property
    def end_of_turn_id(self) -> int:
        """The token that ends an answer.

        Raises:
            InputError: the chat template ends no answer with a special token.
        """
        if not self._ends:
            raise InputError(
                "the chat template ends an answer with no special token, so a model never learns to stop: "
                "end the assistant's turn with the tokenizer's eos_token"
            )
        return next(iter(self._ends))

    def encode(self, conversation: Conversation) -> Stream:
        """One conversation's stream.

        Raises:
            BadRow: the template rewrites an answer, images and marks do not agree, or the row is too long.
        """
        batch = self.encode_batch([conversation])
        if batch.refused:
            raise batch.refused[0]
        return batch.streams[0]

    def encode_batch(self, conversations: Sequence[Conversation]) -> EncodedBatch:
        """Streams and padded inputs of several conversations, by one call of the processor."""
        texts, spans, refused = [], [], {}
        for index, (conversation, rendered) in enumerate(zip(conversations, self._render(conversations), strict=True)):
            try:
                text, pieces = rendered
                texts.append(text)
                spans.append(_answer_spans(conversation, text, pieces))
                if conversation.images and not self.takes_images:
                    raise BadRow(conversation.row, "the row has an image and the model reads text alone")
            except BadRow as error:
                refused[index] = error
        if refused:
            return EncodedBatch(refused=refused)
        try:
            output = self._process(texts, [conversation.images for conversation in conversations])
        except Exception as error:
            if len(conversations) > 1:  # which of them was it?
                single = [self.encode_batch([conversation]).refused for conversation in conversations]
                refused = {index: bad[0] for index, bad in enumerate(single) if bad}
                if not refused:
                    raise InputError(
                        f"{type(self.processor).__name__} takes each of these rows alone and not together "
                        f"({', '.join(conversation.row for conversation in conversations)}): {error}"
                    ) from error
            refused = refused or {0: BadRow(conversations[0].row, f"the processor refuses it: {error}")}
            return EncodedBatch(refused=refused)
        offsets_BT2 = output.pop("offset_mapping")
        replaced_B = output.pop("text_replacement_offsets", None) or [[]] * len(texts)
        lengths_B = output["attention_mask"].sum(-1).tolist()
        streams = []
        for index, conversation in enumerate(conversations):
            length, limit = lengths_B[index], self.max_length
            if limit is not None and length > limit and conversation is not self.filler:
                reason = (
                    f"{length} tokens, more than data.max_length = {limit}: raise it, lower the pixels, or drop the row"
                )
                refused[index] = BadRow(conversation.row, reason)
                continue
            ids_T = output["input_ids"][index, :length]
            text = _expanded(texts[index], replaced_B[index])
            spans_here = [_shifted(span, replaced_B[index]) for span in spans[index]]
            ends = self._ends if conversation.templated else {self.tokenizer.eos_token_id}
            offsets = offsets_BT2[index, :length].tolist()
            answers = find_answers(text, ids_T.tolist(), offsets, spans_here, ends, self.token_bytes)
            streams.append(Stream(conversation.row, text, ids_T, answers))
        if refused:
            return EncodedBatch(refused=refused)
        return EncodedBatch(streams, dict(output))

    def without_limit(self, conversations: Sequence[Conversation]) -> EncodedBatch:
        """Encodes rows of our own making, whatever ``max_length`` is."""
        limit, self.max_length = self.max_length, None
        try:
            batch = self.encode_batch(conversations)
        finally:
            self.max_length = limit
        if batch.refused:
            raise next(iter(batch.refused.values()))
        return batch

    def _render(self, conversations: Sequence[Conversation]) -> list[tuple[str, list[str]]]:
        """Each conversation's text, and the fixed pieces round its answers."""
        rendered: dict[int, tuple[str, list[str]]] = {}
        templated = [i for i, conversation in enumerate(conversations) if conversation.templated]
        if templated and self.renderer.chat_template is None:
            raise InputError(
                f"{type(self.processor).__name__} has no chat template: set tokenizer.chat_template, or use a data "
                "format without one (text, or prompt_completion with plain strings)"
            )
        structured = self.renderer is not self.tokenizer or self.takes_images
        messages = []
        for i in templated:
            turns = conversations[i].messages(structured)
            marked = [dict(turn) for turn in turns]
            for number, turn in enumerate(turn for turn in marked if turn["role"] == "assistant"):
                sentinel = f"\ue000{number}\ue001"
                turn["content"] = [{"type": "text", "text": sentinel}] if structured else sentinel
            messages += [turns, marked]
        if messages:
            texts = self.renderer.apply_chat_template(messages, tokenize=False)
            for i, text, marked in zip(templated, texts[::2], texts[1::2], strict=True):
                rendered[i] = (text, SENTINEL.split(marked)[::2])
        for i, conversation in enumerate(conversations):
            if not conversation.templated:
                pieces = [self.bos]
                for turn in conversation.turns:
                    if turn.role == "assistant":
                        pieces.append("")
                    else:
                        pieces[-1] += turn.text
                pieces[-1] += self.tokenizer.eos_token or ""
                answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
                joined = "".join(piece + answer for piece, answer in zip(pieces, [*answers, ""], strict=True))
                rendered[i] = (joined, pieces)
        return [rendered[i] for i in range(len(conversations))]

    def _process(self, texts: list[str], images: list[list[Image.Image]]) -> dict[str, Any]:
        options: dict[str, Any] = {
            "padding": True,
            "padding_side": "right",
            "return_tensors": "pt",
            "add_special_tokens": False,  # the template has written them
            "return_offsets_mapping": True,
        }
        if not self.takes_images:
            return dict(self.tokenizer(texts, **options))
        options["return_text_replacement_offsets"] = True
        if any(images):
            options["images"] = images
        return dict(self.processor(text=texts, **options))


def same_processing(student: StreamEncoder, teacher: StreamEncoder) -> bool:
    """Whether one encoding serves both models: equal serialised settings, and equal outputs on probe rows."""
    if _serialised(student) != _serialised(teacher):
        return False
    texts = ["Hello, wörld", "two\nlines 12"]
    for size in [(64, 48), (33, 97)] if student.takes_images else [None]:
        for text in texts:
            parts = [Part(text)] + ([Part(image=Image.new("RGB", size, (200, 30, 60)))] if size else [])
            probe = Conversation((Turn("user", tuple(parts)), Turn("assistant", (Part("yes"),))), row="a probe row")
            a, b = student.without_limit([probe]).inputs, teacher.without_limit([probe]).inputs
            if a.keys() != b.keys() or any(isinstance(a[key], Tensor) and not torch.equal(a[key], b[key]) for key in a):
                return False
    return True


def _serialised(encoder: StreamEncoder) -> tuple:
    settings = encoder.processor.to_dict() if encoder.takes_images else {}
    settings.pop("processor_class", None)
    return (
        type(encoder.processor),
        encoder.tokenizer.backend_tokenizer.to_str(),
        encoder.renderer.chat_template,
        repr(sorted(settings.items(), key=lambda item: item[0])),
    )


def _answer_spans(conversation: Conversation, text: str, pieces: list[str]) -> list[tuple[int, int]]:
    """Where the answers stand in the rendered text, in characters.

    Raises:
        BadRow: the template lost or changed an answer or what stands round it.
    """
    answers = [turn.text for turn in conversation.turns if turn.role == "assistant"]
    if len(pieces) != len(answers) + 1:
        reason = (
            f"the chat template renders {len(pieces) - 1} of {len(answers)} answers: use a template that keeps them all"
        )
        raise BadRow(conversation.row, reason)
    at, spans = 0, []
    for number, (piece, answer) in enumerate(zip(pieces, answers, strict=False), start=1):
        after = pieces[number]
        start = at + len(piece)
        found = None
        if text.startswith(piece, at):
            for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
                if text.startswith(form + after, start):
                    found = (start, start + len(form))
                    break
        if found is None:
            reason = (
                f"the chat template rewrites answer {number} or what stands before it (as templates do that strip "
                "earlier thoughts): split the conversation into one row an answer, or use a template that keeps answers"
            )
            raise BadRow(conversation.row, reason)
        spans.append(found)
        at = found[1]
    if not text.endswith(pieces[-1]) or at + len(pieces[-1]) != len(text):
        raise BadRow(conversation.row, "the chat template adds text after the last answer that depends on the answer")
    return spans


def _shifted(span: tuple[int, int], replaced: list[dict]) -> tuple[int, int]:
    """A span of the text as a span of the text with images expanded."""
    shift = sum(len(item["replacement"]) - len(item["text"]) for item in replaced if item["span"][1] <= span[0])
    return span[0] + shift, span[1] + shift


def _expanded(text: str, replaced: list[dict]) -> str:
    pieces, at = [], 0
    for item in replaced:
        pieces += [text[at : item["span"][0]], item["replacement"]]
        at = item["span"][1]
    return "".join([*pieces, text[at:]])
