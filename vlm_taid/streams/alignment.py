"""align: which positions of two streams predict the same thing.

Only answers pair: prompts, templates and image tokens may differ at will. Content tokens pair where both begin at
the same byte of the answer, whatever the two tokenizers; the end of turn pairs with the end of turn.

Legend: N paired answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BadRow
from .answers import Answer
from .encoder import Stream
from .vocabulary import SharedVocabulary


@dataclass(frozen=True)
class Alignment:
    """Paired predicting positions: the hidden state at position i is supervised with token i + 1.

    Args:
        student_positions_N: indices in the student's stream.
        teacher_positions_N: indices in the teacher's.
        target_ids_N: the student's ids of the next tokens.
        content_share: paired content tokens of the student, as a share of its content tokens.
        first_unpaired: answers whose first token did not pair.
        identical_next_share: paired positions whose next tokens are the same token, as a share of all pairs.
    """

    student_positions_N: list[int]
    teacher_positions_N: list[int]
    target_ids_N: list[int]
    content_share: float
    first_unpaired: int
    identical_next_share: float


def align(
    student: Stream,
    teacher: Stream,
    vocabulary: SharedVocabulary,
    *,
    pair: Literal["boundaries", "identical_tokens"] = "boundaries",
    min_paired_share: float = 0.5,
) -> Alignment:
    """Pairs two streams of one conversation.

    Args:
        student: its stream for the student.
        teacher: its stream for the teacher.
        vocabulary: the models' shared vocabulary.
        pair: ``boundaries``: wherever both have a token beginning at the same byte, so that both predict the same
            text; ``identical_tokens``: only where that next token is also the same in both.
        min_paired_share: of the student's answer tokens, ends of turn included.

    Raises:
        BadRow: the answers' texts differ, or under ``min_paired_share`` of the student's answer tokens pair.
    """
    my_ids, their_ids = student.input_ids_T.tolist(), teacher.input_ids_T.tolist()
    pairs: list[tuple[int, int]] = []
    content = supervised = first_unpaired = 0
    for number, (mine, theirs) in enumerate(zip(student.answers, teacher.answers, strict=True), start=1):
        if mine.text.strip() != theirs.text.strip():
            raise BadRow(
                student.row,
                f"answer {number} differs between the student's stream ({mine.text!r}) and the teacher's "
                f"({theirs.text!r}): their chat templates rewrite it differently",
            )
        paired = _content_pairs(mine, theirs, my_ids, their_ids, vocabulary.to_teacher)
        if pair == "identical_tokens":
            paired = [(i, j) for i, j in paired if vocabulary.to_teacher.get(my_ids[i]) == their_ids[j]]
        first_unpaired += not (paired and paired[0][0] == mine.tokens[0])
        content += len(paired)
        supervised += len(mine.tokens) + mine.straddling
        pairs += paired
        if mine.end_of_turn is not None and theirs.end_of_turn is not None:
            pairs.append((mine.end_of_turn, theirs.end_of_turn))
            content, supervised = content + 1, supervised + 1
    pairs = [pair for pair in pairs if min(pair) > 0]  # a first token is predicted by nothing
    share = content / max(supervised, 1)
    if not pairs or share < min_paired_share:
        raise BadRow(
            student.row,
            f"{share:.0%} of the answer's tokens pair between student and teacher, data.min_paired_share is "
            f"{min_paired_share:.0%}: the two tokenizers or templates cut the answer differently",
        )
    identical = sum(vocabulary.to_teacher.get(my_ids[mine]) == their_ids[theirs] for mine, theirs in pairs)
    return Alignment(
        student_positions_N=[mine - 1 for mine, _ in pairs],
        teacher_positions_N=[theirs - 1 for _, theirs in pairs],
        target_ids_N=[my_ids[mine] for mine, _ in pairs],
        content_share=share,
        first_unpaired=first_unpaired,
        identical_next_share=identical / len(pairs),
    )


def _content_pairs(
    mine: Answer, theirs: Answer, my_ids: list[int], their_ids: list[int], to_teacher: dict[int, int]
) -> list[tuple[int, int]]:
    same_ids = [to_teacher.get(my_ids[i]) for i in mine.tokens] == [their_ids[i] for i in theirs.tokens]
    if same_ids and mine.starts[:1] == theirs.starts[:1] and mine.lead == theirs.lead:
        return list(zip(mine.tokens, theirs.tokens, strict=True))
    # bytes of the content without its leading blanks, which one template may strip
    at = {start - theirs.lead: i for start, i in zip(theirs.starts, theirs.tokens, strict=True) if start is not None}
    return [
        (i, at[start - mine.lead])
        for start, i in zip(mine.starts, mine.tokens, strict=True)
        if start is not None and start - mine.lead in at
    ]
