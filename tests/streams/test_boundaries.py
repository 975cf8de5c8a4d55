"""Where tokens begin, in bytes of the answer, for tokenizers of every kind: held against what they decode to."""

import unicodedata

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.kinds import KINDS, kind
from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.errors import BadRow
from vlm_taid.streams import SharedVocabulary, StreamEncoder, align

WORDS = [
    "red", "the", "The", "unit", "123", "naïve", "é", "e\u0301", "a\u0323\u0302", "ﬁ", "²", "שָׁלוֹם", "مرحبا",
    "日本語", "ไทย", "한", "😀", "👍🏽", "👨\u200d👩\u200d👧", "🇫🇷", "1\ufe0f\u20e3", "\u200b", "\u202e", "\xa0",
    "\u3000", "▁", "Ġ", "<0x41>", "</", "Å", "\u212b", "\x00", "\ufffd",
]  # fmt: skip
BLANKS = ["", " ", " ", "  ", "    ", "\n", "\r\n", "\n\n", "\t", " \n"]
TEXTS = st.lists(
    st.tuples(st.sampled_from(BLANKS), st.sampled_from(WORDS) | st.text(max_size=4)), min_size=1, max_size=8
).map(lambda parts: "".join(a + b for a, b in parts))
MANY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def encoder(name):
    tokenizer = kind(name)
    if not hasattr(tokenizer, "encoder_of_tests"):
        tokenizer.encoder_of_tests = StreamEncoder(tokenizer)
    return tokenizer.encoder_of_tests


def stream_of(name, answer):
    """The stream of a row with that answer, or a rejected example where the text is none to be tried."""
    assume(answer.strip() and not any("\ue000" <= character <= "\uf8ff" for character in answer))
    assume("▁" not in answer or not name.startswith(("sentencepiece", "unigram")))  # they cannot tell it from a blank
    turns = (Turn("user", (Part("what?"),)), Turn("assistant", (Part(answer),)))
    try:
        return encoder(name).encode(Conversation(turns))
    except BadRow:
        assume(False)
        raise


def remaining(name, stream, index):
    """What the tokens from an index up to the end of the turn decode to, and whether some of it is lost."""
    tokenizer = kind(name)
    answer = stream.answers[0]

    def decoded(start):  # after an "a": some kinds strip a blank at the begin
        ids = [tokenizer.convert_tokens_to_ids("a"), *stream.input_ids_T[start : answer.end_of_turn].tolist()]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)[1:]

    unknown = tokenizer.unk_token_id in stream.input_ids_T[index : answer.end_of_turn].tolist()
    # SmolLM2 has no tokens for some control characters and rare bytes: they vanish
    vanished = name == "smollm2" and not decoded(answer.tokens[0]).endswith(answer.text) and not answer.straddling
    return decoded(index), unknown or vanished


def same(name, found, expected):
    """Equal, up to what the kind does not tell."""
    if name.startswith("sentencepiece") and expected.startswith("\ufffd"):
        return found.startswith("\ufffd")  # they decode a run of single bytes as a whole
    if name in ("byte_level_nfc", "qwen", "unigram"):
        form = "NFKC" if name == "unigram" else "NFC"
        found, expected = (unicodedata.normalize(form, text) for text in (found, expected))
    return found == expected


@pytest.mark.parametrize("name", KINDS)
def test_tokens_begin_where_their_text_does(name):
    @MANY
    @given(TEXTS)
    @example("red  circle\r\n\r\n  e\u0301 😀👍🏽 שלום")
    def check(answer):
        stream = stream_of(name, answer)
        found = stream.answers[0]
        content = found.text.encode()
        assert found.text == answer and found.end_of_turn is not None
        known = [start for start in found.starts if start is not None]
        assert known == sorted(set(known)), "places rise"
        for index, start in zip(found.tokens, found.starts, strict=True):
            if start is None:
                assert not found.exact
                continue
            before = stream.text.encode()[: len(stream.text[: stream.text.rindex(found.text)].encode())]
            blank = before[start:].decode(errors="replace") if start < 0 else ""
            if start < 0 and not blank.isspace():
                assert start == -1, "the one blank that the tokenizer adds"
                blank = " "
            expected = blank + content[max(start, 0) :].decode(errors="replace")
            text, lossy = remaining(name, stream, index)
            assert lossy or same(name, text, expected), (index, start, text, expected)

    check()


EXACT = ("byte_level", "sentencepiece", "smollm2")


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith(EXACT) and "nfc" not in name])
def test_bytes_place_every_token(name):
    """Tokenizers that lose nothing: each byte of the answer is in one token."""

    @MANY
    @given(TEXTS)
    def check(answer):
        stream = stream_of(name, answer)
        found = stream.answers[0]
        assume(found.tokens and not remaining(name, stream, found.tokens[0])[1])
        assert found.exact
        sizes = [len(encoder(name).token_bytes[i] or b"") for i in stream.input_ids_T[found.tokens].tolist()]
        ends = [start + size for start, size in zip(found.starts, sizes, strict=True)]
        if not found.straddling:
            assert ends[:-1] == found.starts[1:] and ends[-1] == len(answer.encode()) and found.starts[0] <= 0

    check()


PAIRS = [
    ("byte_level", "byte_level_small"),
    ("byte_level", "sentencepiece"),
    ("byte_level_small", "sentencepiece_first"),
    ("sentencepiece_legacy", "byte_level_trimmed"),
    ("byte_level_nfc", "byte_level"),
    ("unigram", "byte_level"),
    ("sentencepiece", "unigram_plain"),
    ("smollm2", "qwen"),
    ("smollm2", "sentencepiece"),
    ("qwen", "unigram"),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_paired_positions_have_the_same_text_before_them(student, teacher):
    vocabulary = SharedVocabulary(encoder(student), encoder(teacher))

    @MANY
    @given(TEXTS)
    @example("red  circle\r\n\r\n  e\u0301 😀👍🏽 שלום")
    @example("a small green triangle, and the unit of measurement")
    def check(answer):
        mine, theirs = stream_of(student, answer), stream_of(teacher, answer)
        assume(mine.answers[0].tokens and theirs.answers[0].tokens)
        pairs = align(mine, theirs, vocabulary, min_paired_share=0.0)
        assert pairs.student_positions_N[-1] + 1 == mine.answers[0].end_of_turn
        assert pairs.teacher_positions_N[-1] + 1 == theirs.answers[0].end_of_turn
        for i, j in zip(pairs.student_positions_N, pairs.teacher_positions_N, strict=True):
            a, lost_a = remaining(student, mine, i + 1)
            b, lost_b = remaining(teacher, theirs, j + 1)
            assert lost_a or lost_b or same(student, a, b) or same(teacher, b, a), (a, b)

    check()
