"""The tokens of an answer, and the byte of the answer at which each of them begins.

Tokens are placed by their own bytes where these, joined, are the text's bytes. Where a tokenizer writes something
else (normalised, lower-cased, unknown characters), its offsets place them, which know characters alone: there a
token begins where the one before it ends, and pieces of one character have no place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from .token_bytes import TokenBytes


@dataclass(frozen=True)
class Answer:
    """One answer in a stream.

    Args:
        text: the answer's content as rendered.
        tokens: indices of its content tokens.
        starts: the byte of the content's UTF-8 at which each of them begins; negative where a token holds a blank
            that stands before the content or is added by the tokenizer; None where the place is not known.
        end_of_turn: index of the end-of-turn token, or None where the template has none.
        straddling: tokens that hold both content and other text; they are context, not answer.
        exact: whether the places come from the tokens' own bytes.
    """

    text: str
    tokens: list[int]
    starts: list[int | None]
    end_of_turn: int | None
    straddling: int = 0
    exact: bool = True

    @property
    def lead(self) -> int:
        """Bytes of blank that the content begins with: what one template may keep and another strip."""
        return len(self.text.encode()) - len(self.text.lstrip().encode())


Offsets = Sequence[Sequence[int]]


def find_answers(
    text: str, ids: list[int], offsets: Offsets, spans: list[tuple[int, int]], ends: set[int], token_bytes: TokenBytes
) -> list[Answer]:
    """The answers at the spans of a text.

    Args:
        text: the whole text that was tokenised.
        ids, offsets: its tokens, and where each stands in it, in characters.
        spans: the answers' places in it, in characters.
        ends: ids that end a turn; the answer's is the one that follows it with nothing but blanks between.
        token_bytes: of the tokenizer.
    """
    answers = []
    for start, stop in spans:
        first = bisect_right(offsets, start, key=itemgetter(1))  # the first token that ends after it
        placed = _by_bytes(text, ids, offsets, (start, stop), first, token_bytes)
        exact = placed is not None
        if placed is None:
            placed = _by_offsets(text, ids, offsets, (start, stop), first, token_bytes)
        tokens, starts, straddling = placed
        end_of_turn = _end_of_turn(text, ids, offsets, stop, first, ends)
        answers.append(Answer(text[start:stop], tokens, starts, end_of_turn, straddling, exact))
    return answers


Placed = tuple[list[int], list[int | None], int]


def _by_bytes(
    text: str, ids: list[int], offsets: Offsets, span: tuple[int, int], first: int, token_bytes: TokenBytes
) -> Placed | None:
    """The answer's tokens by their bytes; None unless these, from token ``first`` on, are the text's up to the next
    special token after the answer (but for one blank that the tokenizer may have added before them)."""
    start, stop = span
    past = first  # one past the last token that is looked at
    while past < len(ids) and not (offsets[past][0] >= stop and ids[past] in token_bytes.special):
        past += 1
    pieces = [token_bytes[i] for i in ids[first:past]]
    if None in pieces:
        return None
    joined = b"".join(pieces)  # pyright: ignore[reportArgumentType, reportCallIssue]
    begin = min(offsets[first - 1][1], offsets[first][0]) if 0 < first < len(ids) else 0
    window = text[begin : offsets[past][0] if past < len(ids) else len(text)].encode()
    if not window.endswith(joined) and not (joined.startswith(b" ") and window.endswith(joined[1:])):
        return None
    at = len(window) - len(joined) - len(text[begin:start].encode())
    size = len(text[start:stop].encode())
    if at > 0:
        return None
    tokens, starts, straddling = [], [], 0
    for index, piece in enumerate(pieces, start=first):
        assert piece is not None
        end = at + len(piece)
        if end > 0 and at < size:
            # a blank before the answer, which a model generates with its first word, is the answer's
            if end <= size and (at >= 0 or piece[:-at].isspace()):
                tokens.append(index)
                starts.append(at)
            else:
                straddling += 1
        at = end
    return tokens, starts, straddling


def _by_offsets(
    text: str, ids: list[int], offsets: Offsets, span: tuple[int, int], first: int, token_bytes: TokenBytes
) -> Placed:
    start, stop = span
    tokens, starts, straddling = [], [], 0
    before: int | None = None  # where the token before ends
    for index in range(first, len(ids)):
        begin, end = offsets[index]
        if begin >= stop and end > begin:
            break
        if end == begin:  # a blank that the offsets leave out: where the next token begins is not known
            before = -1
            continue
        if end <= stop and (begin >= start or text[begin:start].isspace()):
            if before is None:
                place = len(text[start:begin].encode()) if begin >= start else -len(text[begin:start].encode())
                piece = token_bytes[ids[index]]
                place -= piece is not None and piece.startswith(b" ") and not text[begin].isspace()
            elif 0 <= before <= begin and not text[before:begin].strip():
                place = len(text[start:before].encode())
            else:
                place = None
            tokens.append(index)
            starts.append(place)
        else:
            straddling += 1
        before = end
    return tokens, starts, straddling


def _end_of_turn(text: str, ids: list[int], offsets: Offsets, stop: int, first: int, ends: set[int]) -> int | None:
    for index in range(first, len(ids)):
        begin, end = offsets[index]
        if begin < stop or end == begin:
            continue
        if text[stop:begin].strip():
            return None
        if ids[index] in ends:
            return index
    return None
