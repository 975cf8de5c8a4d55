"""A conversation as the text that its chat template writes, with the places of its answers in that text.

Answers are found in text, not in tokens: the conversation is rendered once with sentinels in place of the answers and
once for real; what stands between the fixed pieces is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import Conversation, Part, Turn
from ..data.templates import begin_of_text, left_out_begin
from ..errors import BadRow, InputError
from .processors import TEMPLATES

SENTINEL = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Rendered:
    """A row's text, and each supervised answer's begin and end in it, in characters."""

    text: str
    spans: list[tuple[int, int]]


class Renderer:
    """Renders conversations for one model.

    Args:
        processor: a processor, or a tokenizer for text alone.
        last_answer_alone: the last answer is supervised and the earlier ones are context.
        system: what every templated row begins with as its system turn, before the row's own; None: rows as they are.
    """

    def __init__(self, processor: Any, *, last_answer_alone: bool = False, system: str | None = None):
        self.processor, self.last_answer_alone, self.system = processor, last_answer_alone, system
        self.tokenizer = getattr(processor, "tokenizer", processor)
        # a processor's template reads content as parts, a tokenizer's as one string
        self.source = processor if getattr(processor, "chat_template", None) else self.tokenizer
        self.template: str | None = self.source.chat_template
        self.bos, self.begin = begin_of_text(self.tokenizer), left_out_begin(processor)
        if self.template is None and type(processor).__name__ in TEMPLATES:
            self.source, self.template = processor, TEMPLATES[type(processor).__name__]
        self.structured = self.source is not self.tokenizer or getattr(processor, "image_processor", None) is not None

    def __call__(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        """Each conversation rendered, or why it cannot be.

        Raises:
            InputError: a conversation needs a chat template and there is none.
        """
        return self._rendered([self._with_system(conversation) for conversation in conversations])

    def _with_system(self, conversation: Conversation) -> Conversation:
        if self.system is None or not conversation.templated:
            return conversation
        turns = conversation.turns
        own = turns[0] if turns[0].role == "system" else None
        parts = (Part(self.system),) if own is None else (Part(self.system + "\n\n"), *own.parts)
        return replace(conversation, turns=(Turn("system", parts), *turns[own is not None :]))

    def _rendered(self, conversations: Sequence[Conversation]) -> list[Rendered | BadRow]:
        templated = [i for i, conversation in enumerate(conversations) if conversation.templated]
        if templated and self.template is None:
            raise InputError(
                f"{type(self.processor).__name__} has no chat template: set tokenizer.chat_template, or use a data "
                "format without one (text, or prompt_completion with plain strings)"
            )
        rendered: dict[int, Rendered | BadRow] = {
            i: self._plain(conversation) for i, conversation in enumerate(conversations) if not conversation.templated
        }
        messages = [form for i in templated for form in self._forms(conversations[i])]
        try:
            texts: list[str] = self._apply(messages) if messages else []
        except Exception as error:  # a template may raise anything
            if len(conversations) > 1:  # which of them was it?
                return [self._rendered([conversation])[0] for conversation in conversations]
            reason = f"the chat template refuses it: {error}: change its turns, or use a template that takes them"
            return [BadRow(conversations[0].row, reason)]
        for i, text, marked in zip(templated, texts[::2], texts[1::2], strict=True):
            try:
                spans = self._spans(conversations[i], text, SENTINEL.split(marked)[::2])
                rendered[i] = Rendered(text, spans)
            except BadRow as error:
                rendered[i] = error
        return [rendered[i] for i in range(len(conversations))]

    def _apply(self, messages: list[list[dict[str, Any]]], **options: Any) -> list[str]:
        texts = self.source.apply_chat_template(messages, chat_template=self.template, tokenize=False, **options)
        return [text if text.startswith(self.begin) else self.begin + text for text in texts]

    def _answers(self, conversation: Conversation) -> list[int]:
        """Which turns are supervised."""
        answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        return answers[-1:] if self.last_answer_alone else answers

    def _forms(self, conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The messages as they are, and with sentinels for answers."""
        messages = conversation.messages(self.structured)
        marked = [dict(message) for message in messages]
        for number, turn in enumerate(self._answers(conversation)):
            sentinel = f"\ue000{number}\ue001"
            marked[turn]["content"] = [{"type": "text", "text": sentinel}] if self.structured else sentinel
        return messages, marked

    def _plain(self, conversation: Conversation) -> Rendered:
        """The turns' texts as they are between the begin and the end of text."""
        text, spans, answers = self.bos, [], self._answers(conversation)
        for i, turn in enumerate(conversation.turns):
            if i in answers:
                spans.append((len(text), len(text) + len(turn.text)))
            text += turn.text
        return Rendered(text + (self.tokenizer.eos_token or ""), spans)

    def _spans(self, conversation: Conversation, text: str, pieces: list[str]) -> list[tuple[int, int]]:
        """Where the answers stand in a rendered text, from the fixed pieces round them.

        Raises:
            BadRow: the template lost or changed an answer or what stands round it.
        """
        turns = self._answers(conversation)
        if len(pieces) != len(turns) + 1:
            reason = f"the chat template renders {len(pieces) - 1} of {len(turns)} answers: "
            raise BadRow(conversation.row, reason + "use a template that keeps them all, or set data.answers: last")
        at, spans = 0, []
        for number, turn in enumerate(turns):
            span = None
            if text.startswith(pieces[number], at):
                span = _found(text, at + len(pieces[number]), conversation.turns[turn].text, pieces[number + 1])
            if span is None:
                span = self._after_prompt(conversation, turn, text, at, pieces[number + 1], number + 1)
            spans.append(span)
            at = span[1]
        if not text.endswith(pieces[-1]) or at + len(pieces[-1]) != len(text):
            raise BadRow(
                conversation.row, "the chat template adds text after the last answer that depends on the answer"
            )
        return spans

    def _after_prompt(
        self, conversation: Conversation, turn: int, text: str, at: int, after: str, number: int
    ) -> tuple[int, int]:
        """An answer that changes what stands before it, as one with thoughts does: it begins where its prompt ends.

        Raises:
            BadRow: it is not there either.
        """
        before = conversation.messages(self.structured)[:turn]
        prompt = self._apply([before], add_generation_prompt=True)[0]
        last, written = turn == len(conversation.turns) - 1, ""
        if text.startswith(prompt) and len(prompt) >= at:
            span = _found(text, len(prompt), conversation.turns[turn].text, after)
            if span is not None:
                return span
            if last and text.endswith(after):
                written = f" to {text[len(prompt) : len(text) - len(after)]!r:.200}"
        raise BadRow(
            conversation.row,
            f"the chat template rewrites answer {number}{written} or what stands before it (as templates do that strip "
            "earlier thoughts): "
            + ("write the answer in the template's form" if last else "set data.answers: last, so that it is context")
            + ", or use a template that keeps answers",
        )


def _found(text: str, start: int, answer: str, after: str) -> tuple[int, int] | None:
    """The span of an answer at a place of the text, as it is or stripped, if ``after`` follows it."""
    for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
        if text.startswith(form + after, start):
            return start, start + len(form)
    return None
