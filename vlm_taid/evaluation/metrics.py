"""How an answer is scored against its references.

Each metric follows one named flavour, since the public harnesses disagree on details that move scores by points.
The flavour goes into the results file. The definitions are those of lmms-eval 0.7.3, in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_taid.errors import InputError

# Contractions of VQAv2 (Antol et al. 2015, the official evaluation): each is found without its apostrophe.
_ONE_APOSTROPHE = """
'twas I'm I've ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
I'd've couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_IRREGULAR = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())}}
ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'  # `: ' $ % & * # ~` and the full stop are not among them
_ASCII_PUNCTUATION = str.maketrans("", "", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def _contractions() -> dict[str, str]:
    """The 120 spellings that the official code knows, from the rule that generates them."""
    table = {form.replace("'", ""): form for form in _ONE_APOSTROPHE.split()}
    for form in _TWO_APOSTROPHES.split():
        first, last = form.index("'"), form.rindex("'")
        table[form[:first] + form[first + 1 :]] = form
        table[form[:last] + form[last + 1 :]] = form
    return table | _IRREGULAR


CONTRACTIONS = _contractions()


def normalize_vqa(text: str) -> str:
    """An answer as VQAv2's evaluation compares it: punctuation, number words, articles and contractions folded.

    The punctuation rule looks at the text as it came in: a mark that touches a blank anywhere in it is deleted
    everywhere, else it becomes a blank; digit,comma,digit anywhere makes all marks be deleted. At most 32 full stops
    go. All of this is the official behaviour, kept as it is.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    deletes_all = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _MARKS:
        deleted = deletes_all or mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    words = (NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize_textvqa(text: str) -> str:
    """As `normalize_vqa`, after the first step of TextVQA's, OK-VQA's and VizWiz's processor."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(text.strip())


def normalize_gqa(text: str) -> str:
    """Stripped, lower case, without ASCII punctuation; no blank is put in its place."""
    return text.strip().lower().translate(_ASCII_PUNCTUATION)


def normalize_exact(text: str) -> str:
    """Stripped and case-folded, nothing else."""
    return text.strip().casefold()


def _leave_one_out(prediction: str, references: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3). Annotators are told apart by position."""
    matches = [prediction == reference for reference in references]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _any_equal(prediction: str, references: Sequence[str]) -> float:
    return float(prediction in references)


@dataclass(frozen=True)
class Metric:
    """A metric: how texts are normalised, how the normalised are compared, and whose convention that is.

    Args:
        normalize: applied to the prediction and to each reference.
        compare: (normalised prediction, normalised references) -> score between 0 and 1.
        flavor: whose definition this is; written into the results.
    """

    normalize: Callable[[str], str]
    compare: Callable[[str, Sequence[str]], float]
    flavor: str

    def __call__(self, prediction: str, references: Sequence[str]) -> float:
        return self.compare(self.normalize(prediction), [self.normalize(reference) for reference in references])


METRICS: dict[str, Metric] = {
    "vqa_accuracy": Metric(normalize_vqa, _leave_one_out, "lmms-0.7.3"),
    "textvqa_accuracy": Metric(normalize_textvqa, _leave_one_out, "lmms-0.7.3"),
    "gqa_exact_match": Metric(normalize_gqa, _any_equal, "lmms-0.7.3"),
    "exact_match": Metric(normalize_exact, _any_equal, "vlm_taid"),
}


def metric(name: str) -> Metric:
    """The metric of that name; InputError names the known ones."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
    return METRICS[name]


def reference_texts(references: Any) -> list[str]:
    """References as data sets write them, as a list of texts.

    Args:
        references: a text, a number, a list of these, or VQAv2's list of ``{"answer": text, ...}``. None is no
            reference.
    """
    if references is None:
        return []
    if isinstance(references, str) or not isinstance(references, Sequence):
        references = [references]
    return [str(item["answer"] if isinstance(item, Mapping) else item) for item in references]


def score(name: str, prediction: str, references: Any, **options: Any) -> float:
    """Scores one answer.

    Args:
        name: ``vqa_accuracy`` and ``textvqa_accuracy`` (leave one annotator out, so one reference alone always gives
            0), ``gqa_exact_match`` (equal to any reference, punctuation ignored), or ``exact_match`` (this package's
            plain one: equal to any reference after strip and casefold).
        prediction: the model's answer.
        references: a list of texts (or of VQAv2's ``{"answer": ...}``); never changed.
        **options: of the metric; the present ones take none.

    Returns:
        A score between 0 and 1.

    Raises:
        InputError: unknown metric, unknown option, or no references.
    """
    if options:
        raise InputError(f"metric {name!r} takes no option {next(iter(options))!r}")
    texts = reference_texts(references)
    if not texts:
        raise InputError(f"metric {name!r}: no reference answer to score {prediction!r} against")
    return metric(name)(prediction.strip(), texts)
