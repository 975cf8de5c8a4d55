"""Row formats: each turns a row (a dict of columns) into a Conversation, or says with a BadRow what is wrong.

Pictures are the columns ``image`` and ``images`` (one or a list, or none), placed where the text has an ``<image>``
mark, in order. If no turn has a mark, they all go to the start of the first user turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from PIL import Image

from vlm_taid.data.conversation import Conversation, Part, Role, Turn
from vlm_taid.data.images import load_image
from vlm_taid.errors import BadRow

FormatName = Literal["messages", "llava", "vqa", "prompt_completion", "text"]

IMAGE_COLUMNS = ("image", "images")

# One line break beside a mark belongs to the mark: chat templates put their own.
_MARK = re.compile(r"\n?<image>\n?")


@dataclass(frozen=True)
class RowContext:
    """What a format needs to know beside the row.

    Args:
        row: the row's origin, for messages.
        folder: the data root, under which pictures lie.
        allow_urls: pictures may be fetched.
        need_answer: for training, where a row without an answer is bad. Else the conversation ends with the question:
            a last assistant turn is left out and becomes ``fields["answers"]``, unless the row has that column.
        prompt: how the ``vqa`` format phrases the question, with ``{question}`` in it.
    """

    row: str
    folder: Path
    allow_urls: bool = False
    need_answer: bool = True
    prompt: str | None = None

    def bad(self, reason: str) -> BadRow:
        """The error to raise for this row."""
        return BadRow(self.row, reason)


@dataclass(frozen=True)
class _Picture:
    """Where a picture stands in a turn. ``value`` None: the next one of the row's image columns."""

    value: Any = None


_Draft = list[tuple[Role, list["str | _Picture"]]]


def messages(row: dict[str, Any], context: RowContext) -> Conversation:
    """Chat messages, as TRL and the Hugging Face hub write them.

    Column ``messages``: a list of ``{"role": "system" | "user" | "assistant", "content": ...}``. The content is a
    string, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``; a picture may be given in its
    part, under ``image``, ``path`` or ``url``.

    Raises:
        BadRow: as everywhere here, a column, an answer or a picture is missing or broken, a role is unknown, or there
            are not as many marks as pictures.
    """
    draft = _draft(_column(row, "messages", context), "messages", context)
    return _conversation(draft, row, ("messages",), context)


def llava(row: dict[str, Any], context: RowContext) -> Conversation:
    """LLaVA's form. Column ``conversations``: a list of ``{"from": "human" | "gpt" | "system", "value": text}``.

    Raises:
        BadRow: as in `messages`.
    """
    roles: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = _column(row, "conversations", context)
    draft = _draft(turns, "conversations", context, role_key="from", content_key="value", roles=roles)
    return _conversation(draft, row, ("conversations",), context)


def vqa(row: dict[str, Any], context: RowContext) -> Conversation:
    """A question about pictures. Columns ``question``, ``answer`` or ``answers``.

    Trained on is ``answer`` if it is one text, else the most common of the answers, the first one among equals.
    ``fields["answers"]`` keeps all. With a prompt that has no ``{question}``, such as "Describe the picture.", the
    row has no question either.

    Raises:
        BadRow: as in `messages`.
    """
    if context.prompt is None:
        question = _text(_column(row, "question", context), "question", context)
    elif "{question}" in context.prompt:
        question = _text(_column(row, "question", context), "question", context)
        question = context.prompt.replace("{question}", question)
    elif row.get("question") is None:
        question = context.prompt
    else:
        raise context.bad("the row has a question, but the `prompt` has no {question} in it: write where it goes")

    answer, answers = row.get("answer"), row.get("answers")
    if answer is None and answers is None and context.need_answer:
        _column(row, "answer", context)
    if answers is None or isinstance(answer, list):
        answers = answer
    texts = [_answer_text(value, context) for value in _as_list(answers)]
    if answer is not None and not isinstance(answer, list):
        chosen = _answer_text(answer, context)
    else:
        chosen = Counter(texts).most_common(1)[0][0] if texts else ""
    draft: _Draft = [("user", _split(question)), ("assistant", [chosen])]
    return _conversation(draft, {**row, "answers": texts}, ("question", "answer"), context)


def prompt_completion(row: dict[str, Any], context: RowContext) -> Conversation:
    """Columns ``prompt`` and ``completion``: both texts (no chat template is used), or both lists of messages.

    Of messages, all assistant turns are answers, those in the prompt too.

    Raises:
        BadRow: as in `messages`; or plain texts come with pictures.
    """
    columns = ("prompt", "completion")
    prompt = _column(row, "prompt", context)
    completion = _column(row, "completion", context) if context.need_answer else row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list | None):
        chat = _draft(prompt, "prompt", context) + _draft(completion or [], "completion", context)
        return _conversation(chat, row, columns, context)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise context.bad("prompt and completion must both be texts or both be lists of messages")
    draft: _Draft = [("user", [_text(prompt, "prompt", context)])]
    draft.append(("assistant", [_text(completion, "completion", context)]))
    return _conversation(draft, row, columns, context, templated=False)


def text(row: dict[str, Any], context: RowContext) -> Conversation:
    """Plain text to continue pre-training on. Column ``text``; all of it is supervised, no chat template is used.

    Raises:
        BadRow: the text is missing or empty, or there are pictures.
    """
    draft: _Draft = [("assistant", [_text(_column(row, "text", context), "text", context)])]
    return _conversation(draft, row, ("text",), context, templated=False)


FORMATS: dict[FormatName, Callable[[dict[str, Any], RowContext], Conversation]] = {
    "messages": messages,
    "llava": llava,
    "vqa": vqa,
    "prompt_completion": prompt_completion,
    "text": text,
}


def _column(row: dict[str, Any], name: str, context: RowContext) -> Any:
    if row.get(name) is None:
        state = "is null" if name in row else "is missing"
        raise context.bad(
            f"column {name!r} {state}; the row's columns are {', '.join(map(str, row)) or 'none'}. "
            f"If yours has another name, say so: `columns: {{{name}: THE_NAME}}`"
        )
    return row[name]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _text(value: Any, what: str, context: RowContext) -> str:
    """A text, or a number as text. None is the empty text."""
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise context.bad(f"{what} must be a text, got {type(value).__name__}")


def _answer_text(value: Any, context: RowContext) -> str:
    if isinstance(value, dict):  # VQAv2: {"answer": "yes", "answer_confidence": ..., "answer_id": ...}
        value = value.get("answer")
    return _text(value, "answer", context)


def _split(content: str) -> list[str | _Picture]:
    """A text cut at its image marks."""
    first, *others = _MARK.split(content)
    pieces: list[str | _Picture] = [first]
    for other in others:
        pieces += [_Picture(), other]
    return pieces


def _draft(
    turns: Any,
    column: str,
    context: RowContext,
    role_key: str = "role",
    content_key: str = "content",
    roles: dict[str, Role] | None = None,
) -> _Draft:
    roles = roles or {"system": "system", "user": "user", "assistant": "assistant"}
    if not isinstance(turns, list):
        raise context.bad(f"column {column!r} must be a list of turns, got {type(turns).__name__}")
    draft: _Draft = []
    for number, turn in enumerate(turns):
        where = f"{column}[{number}]"
        if not isinstance(turn, dict) or role_key not in turn or turn.get(content_key) is None:
            raise context.bad(f"{where} must be an object with {role_key!r} and {content_key!r}")
        role, content = turn[role_key], turn[content_key]
        if role not in roles:
            raise context.bad(f"{where} has the unknown role {role!r}; expected {', '.join(roles)}")
        if isinstance(content, list):
            pieces = [piece for part in content for piece in _part_pieces(part, where, context)]
        else:
            pieces = _split(_text(content, where, context))
        draft.append((roles[role], pieces))
    return draft


def _part_pieces(part: Any, where: str, context: RowContext) -> list[str | _Picture]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _split(_text(part.get("text"), where, context))
    if kind == "image":
        given = (part.get(key) for key in ("image", "path", "url"))
        return [_Picture(next((value for value in given if value is not None), None))]
    raise context.bad(f"{where}: a part must have the type text (with a text) or image, got {part!r:.80}")


def _conversation(
    draft: _Draft, row: dict[str, Any], columns: tuple[str, ...], context: RowContext, templated: bool = True
) -> Conversation:
    """Check the turns, put the row's pictures in their places, and keep the columns that were not used."""
    values = [value for name in IMAGE_COLUMNS for value in _as_list(row.get(name)) if value is not None and value != ""]
    fields = {
        name: value
        for name, value in row.items()
        if name not in (*IMAGE_COLUMNS, *columns) and not any(map(_is_picture, _as_list(value)))
    }
    if not context.need_answer and len(draft) > 1 and draft[-1][0] == "assistant":
        answer = "".join(piece for piece in draft.pop()[1] if isinstance(piece, str))
        if answer.strip():
            fields.setdefault("answers", [answer])

    roles = [role for role, _ in draft]
    if context.need_answer and "assistant" not in roles:
        raise context.bad("there is no assistant turn, so no answer to learn: add one or drop the row")
    if templated and "user" not in roles:
        raise context.bad("there is no user turn: add one or drop the row")
    for number, (role, pieces) in enumerate(draft, start=1):
        pictured = any(isinstance(piece, _Picture) for piece in pieces)
        if pictured and role == "assistant":
            raise context.bad(f"turn {number} (assistant) has an image: answers are text, move it or drop the row")
        if role != "system" and not pictured and not "".join(cast("list[str]", pieces)).strip():
            what = "the answer" if role == "assistant" else "the text"
            raise context.bad(f"turn {number} ({role}): {what} is empty: fill it in or drop the row")

    pictures = [piece for _, pieces in draft for piece in pieces if isinstance(piece, _Picture)]
    if (values or pictures) and not templated:
        raise context.bad("plain text cannot hold images: give messages, or drop the image column")
    if values and not pictures:
        draft[roles.index("user")][1][:0] = pictures = [_Picture()] * len(values)
    marks = sum(picture.value is None for picture in pictures)
    if marks != len(values):
        raise context.bad(f"{marks} image marks in the text, but {len(values)} images in the row: they must be as many")

    remaining = iter(values)
    turns = []
    for role, pieces in draft:
        parts = []
        for piece in pieces:
            if isinstance(piece, _Picture):
                value = next(remaining) if piece.value is None else piece.value
                parts.append(Part(image=load_image(value, context.folder, context.row, allow_urls=context.allow_urls)))
            elif piece:
                parts.append(Part(text=piece))
        turns.append(Turn(role, tuple(parts) or (Part(text=""),)))
    return Conversation(tuple(turns), row=context.row, templated=templated, fields=fields)


def _is_picture(value: Any) -> bool:
    return isinstance(value, bytes | Image.Image) or (isinstance(value, dict) and set(value) == {"bytes", "path"})
