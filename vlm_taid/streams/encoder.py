"""StreamEncoder: a conversation becomes the token stream of one model, with its answers found in it.

Answers are found in the rendered text (``rendering``), not in tokens; the processor's offsets then give the tokens,
however many tokens an image takes.

Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import Conversation, DataOptions, Part, Turn
from ..errors import BadRow, InputError
from .answers import Answer, find_answers
from .processors import TEMPLATES, Offsets, finish, process
from .rendering import Renderer
from .token_bytes import TokenBytes


@dataclass(frozen=True)
class Stream:
    """A row as one model reads it.

    Args:
        row: where it came from, for messages.
        text: the rendered text, its images expanded.
        input_ids_T: token ids, without padding.
        answers: the supervised turns, with their tokens.
        images: where in the text, in characters, the images stand with the marks that frame and break them.
    """

    row: str
    text: str
    input_ids_T: Tensor
    answers: list[Answer]
    images: list[tuple[int, int]] = field(default_factory=list)


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
        options: DataOptions; ``max_length`` and ``answers`` are used.
        system: a system prompt that this model alone reads, before a row's own; rows without a template have none.

    Raises:
        InputError: the tokenizer has no offsets, the chat template does not write the system prompt, or
            a proof fails: the answers found in two made-up rows must be the ones that were put in.
    """

    def __init__(self, processor: Any, options: DataOptions | None = None, *, system: str | None = None):
        self.processor = processor
        options = options or DataOptions(train=[])
        self.max_length = options.max_length
        self.tokenizer = getattr(processor, "tokenizer", processor)
        name = type(self.tokenizer).__name__
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(f"{name} has no offsets: a fast tokenizer (tokenizer.json) is needed to find the answers")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masks come from lengths, so any id will do
        self.takes_images = getattr(processor, "image_processor", None) is not None
        self.renderer = Renderer(processor, last_answer_alone=options.answers == "last", system=system)
        self.token_bytes = TokenBytes(self.tokenizer)
        picture = (Part(image=Image.new("RGB", (64, 64), (128, 128, 128))),) if self.takes_images else ()
        templated = self.renderer.template is not None
        turns = (Turn("user", (*picture, Part("Hello"))), Turn("assistant", (Part("Hello"),)))
        self.filler = Conversation(turns, row="the filler row", templated=templated)
        """A short row with a picture, if the model takes any: what fills a batch that would have none."""
        if system is not None:
            self._check_system(system)
        image_id = getattr(processor, "image_token_id", None)
        self._ends = {
            i for i in self.token_bytes.special if i != image_id
        }  # narrowed to the one token that ends answers
        self._more_tokens: dict[tuple[tuple[int, int], ...], int] = {}  # than their marks, by the pictures' sizes
        end = self._proven(self.filler)
        self._ends = set() if end is None else {end}
        if templated and self.renderer.template not in TEMPLATES.values():
            self._proven(Conversation((*turns, *turns), row="the two-turn row"))

    def _check_system(self, system: str) -> None:
        rendered = self.renderer([self.filler])[0] if self.filler.templated else None
        if rendered is None or isinstance(rendered, BadRow) or system.strip() not in rendered.text:
            why = f" ({rendered.reason})" if isinstance(rendered, BadRow) else ""
            raise InputError(
                f"{type(self.processor).__name__}: the chat template does not write the system prompt "
                f"{system!r:.80}{why}: leave teacher.system out, or use a template that writes system turns"
            )

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

    @property
    def stop_ids(self) -> set[int]:
        """What ends a generated text: the tokenizer's end of text, and the template's end of turn."""
        return {i for i in (self.tokenizer.eos_token_id, *self._ends) if i is not None}

    def encode(self, conversation: Conversation) -> Stream:
        """One conversation's stream.

        Raises:
            BadRow: the template rewrites an answer, images and marks do not agree, or the row is too long.
        """
        batch = self.encode_batch([conversation])
        if batch.refused:
            raise batch.refused[0]
        return batch.streams[0]

    def length(self, conversation: Conversation) -> int:
        """Tokens of a row's stream, 0 for a row that ``encode`` refuses.

        How many a picture takes depends on its size alone, so the processor sees each size but once.
        """
        rendered = self.renderer([conversation])[0]
        if isinstance(rendered, BadRow) or self._wrong_images(conversation, rendered.text) is not None:
            return 0
        marked = len(self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
        sizes = tuple(image.size for image in conversation.images)
        if sizes not in self._more_tokens:
            batch = self.encode_batch([conversation])
            if batch.refused:
                return 0
            self._more_tokens[sizes] = len(batch.streams[0].input_ids_T) - marked
        length = marked + self._more_tokens[sizes]
        return 0 if self.max_length is not None and length > self.max_length else length

    def encode_batch(self, conversations: Sequence[Conversation]) -> EncodedBatch:
        """Streams and padded inputs of several conversations, by one call of the processor.

        Raises:
            InputError: the processor takes each of the rows alone and not together.
        """
        refused: dict[int, BadRow] = {}
        texts, spans = [], []
        for index, (conversation, rendered) in enumerate(zip(conversations, self.renderer(conversations), strict=True)):
            bad = rendered if isinstance(rendered, BadRow) else self._wrong_images(conversation, rendered.text)
            if bad is not None:
                refused[index] = bad
            elif not isinstance(rendered, BadRow):
                texts.append(rendered.text)
                spans.append(rendered.spans)
        if refused:
            return EncodedBatch(refused=refused)
        try:
            images = [conversation.images for conversation in conversations] if self.takes_images else None
            processed = process(self.processor, texts, images)
        except Exception as error:
            if len(conversations) > 1:  # which of them was it?
                single = [self.encode_batch([conversation]).refused for conversation in conversations]
                refused = {index: bad[0] for index, bad in enumerate(single) if bad}
                if not refused:
                    raise InputError(
                        f"{type(self.processor).__name__} takes each of these rows alone and not together "
                        f"({', '.join(conversation.row for conversation in conversations)}): {error}"
                    ) from error
            sizes = ", ".join(f"{image.width} x {image.height}" for image in conversations[0].images) or "none"
            reason = f"the processor refuses it: {error} (images, in pixels: {sizes}): change it or drop the row"
            refused = refused or {0: BadRow(conversations[0].row, reason)}
            return EncodedBatch(refused=refused)
        output, replaced_B = processed.inputs, processed.replaced_B
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
            text, images_here = _expanded(texts[index], replaced_B[index])
            spans_here = [_shifted(span, replaced_B[index]) for span in spans[index]]
            ends = self._ends if conversation.templated else {self.tokenizer.eos_token_id}
            offsets = Offsets(processed.encodings_B[index], length)
            answers = find_answers(text, ids_T.tolist(), offsets, spans_here, ends, self.token_bytes)
            streams.append(Stream(conversation.row, text, ids_T, answers, images_here))
        if refused:
            return EncodedBatch(refused=refused)
        finish(self.processor, output, streams)
        return EncodedBatch(streams, output)

    def _wrong_images(self, conversation: Conversation, text: str) -> BadRow | None:
        """Images that the model cannot take, or that the rendered row has not a mark each for.

        Processors count over a whole batch, where one row's surplus would take another row's image.
        """
        images, mark = len(conversation.images), getattr(self.processor, "image_token", None)
        if images and not self.takes_images:
            return BadRow(conversation.row, "the row has an image and the model reads text alone")
        marks = images if mark is None or not self.takes_images else text.count(mark)
        if marks == images:
            return None
        reason = f"the rendered row has {marks} image marks ({mark}) and {images} images: "
        if marks > images:
            return BadRow(conversation.row, reason + "take the mark out of its texts, or name the image it stands for")
        return BadRow(conversation.row, reason + "the chat template leaves images out, use one that marks them all")

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


def same_processing(student: StreamEncoder, teacher: StreamEncoder) -> bool:
    """Whether one encoding serves both models: equal serialised settings, and equal outputs on probe rows."""
    if serialised(student) != serialised(teacher):
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


def serialised(encoder: StreamEncoder) -> tuple:
    """What decides how an encoder reads rows."""
    settings = encoder.processor.to_dict() if encoder.takes_images else {}
    settings.pop("processor_class", None)
    return (
        type(encoder.processor),
        encoder.tokenizer.backend_tokenizer.to_str(),
        encoder.renderer.template,
        encoder.renderer.system,
        repr(sorted(settings.items(), key=lambda item: item[0])),
    )


def _shifted(span: tuple[int, int], replaced: list[dict]) -> tuple[int, int]:
    """A span of the text as a span of the text with images expanded."""
    shift = sum(len(item["replacement"]) - len(item["text"]) for item in replaced if item["span"][1] <= span[0])
    return span[0] + shift, span[1] + shift


def _expanded(text: str, replaced: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """A text with its images expanded, and where in it they stand."""
    expanded, spans, at = "", [], 0
    for item in replaced:
        expanded += text[at : item["span"][0]]
        spans.append((len(expanded), len(expanded) + len(item["replacement"])))
        expanded += item["replacement"]
        at = item["span"][1]
    return expanded + text[at:], spans
