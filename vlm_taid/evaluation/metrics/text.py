"""Metrics that compare one text with reference texts. The definitions are lmms-eval 0.7.3's, in our own words."""

from __future__ import annotations

import re
import string
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


def fold_marks(text: str) -> str:
    """The punctuation rule of `normalize_vqa`, without its full stops."""
    deletes_all = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _MARKS:
        deleted = deletes_all or mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return cleaned


def normalize_vqa(text: str) -> str:
    """An answer as VQAv2's evaluation compares it: punctuation, number words, articles and contractions folded.

    The punctuation rule looks at the text as it came in: a mark that touches a blank anywhere in it is deleted
    everywhere, else it becomes a blank; digit,comma,digit anywhere makes all marks be deleted. At most 32 full stops
    go. All of this is the official behaviour, kept as it is.
    """
    return _folded(re.sub(r"\.(?!\d)", "", fold_marks(_one_line(text)), count=32))


def normalize_vqa_vlmevalkit(text: str) -> str:
    """As `normalize_vqa`, but a full stop that touches a digit on either side stays: "5." is not "5"."""
    return _folded(re.sub(r"(?<!\d)\.(?!\d)", "", fold_marks(_one_line(text))))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _folded(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
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


def _official_vqa(prediction: str, references: Sequence[str]) -> float:
    """VQAv2's own code folds nothing where all annotators agree: "Red" against ten "red" is 0."""
    if len(set(references)) > 1:
        prediction, references = normalize_vqa(prediction), [normalize_vqa(text) for text in references]
    return _leave_one_out(prediction, references)


def _any_equal(prediction: str, references: Sequence[str]) -> float:
    return float(prediction in references)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def _anls(prediction: str, references: Sequence[str]) -> float:
    """Best similarity over the references, 0 below one half (Biten et al. 2019).

    The length that divides is of the texts before blanks are collapsed, in upper case, where "ß" counts two.
    """
    distances = []
    for reference in references:
        pair = [" ".join(text.lower().split()) for text in (prediction, reference)]
        length = max(len(prediction.upper()), len(reference.upper()))
        distances.append(edit_distance(*pair) / length if length else 0.0)
    best = 1 - min(distances)
    return best if best >= 0.5 else 0.0


def _as_number(text: str) -> float | None:
    """A number as Python reads it, a trailing % dividing by 100; None if it is none."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed(prediction: str, references: Sequence[str]) -> float:
    """Numbers within 5 % of the target, texts equal without regard to case; a target of 0 is compared as a text."""
    for reference in references:
        value, target = _as_number(prediction), _as_number(reference)
        if value is not None and target:
            right = abs(value - target) / abs(target) <= 0.05
        else:
            right = prediction.lower() == reference.lower()
        if right:
            return 1.0
    return 0.0


def _final_answer(text: str) -> str:
    """What stands on the first filled line after the last "Answer:", without Markdown; empty if there is none."""
    text = re.sub(r"([aA]nswer)\**:\**", r"\1:", text)
    at = text.lower().rfind("answer:")
    if at < 0:
        return ""
    lines = (line.strip() for line in text[at + len("answer:") :].split("\n"))
    return re.sub(r"[*_\[\]()]", "", next(filter(None, lines), ""))


def _chart_text(text: str) -> str:
    """Without thousands' commas, dollar signs and end punctuation if there is a digit; else without outer quotes."""
    if any(character.isdigit() for character in text):
        while text and text[-1] != "%" and (text[-1] in string.punctuation or text[-1].isspace()):
            text = text[:-1]
        return text.replace(",", "").replace("$", "")
    quoted = text[:1] in ('"', "'") and text.endswith(text[:1])
    return text[1:-1] if quoted else text


def _relaxed_lm_eval(prediction: str, references: Sequence[str]) -> float:
    """lm-eval's chartqa: only what follows "Answer:" counts; percentages match with and without their sign."""
    prediction = _chart_text(_final_answer(prediction))
    if not prediction:
        return 0.0

    def read(text: str) -> tuple[float | None, float]:
        try:
            value = float(text.strip().rstrip("%"))
        except ValueError:
            return None, 1.0
        return value, 0.01 if text.strip().endswith("%") else 1.0

    for reference in map(_chart_text, references):
        (value, value_scale), (target, target_scale) = read(prediction), read(reference)
        if value is not None and target is not None:
            pairs = [(value, target), (value * value_scale, target), (value, target * target_scale)]
            right = any(abs(p - t) <= 0.05 * max(abs(t), 1e-10) for p, t in pairs)
        elif len(reference) == 1 and reference.isalpha():
            right = prediction[0].lower() == reference.lower()
        else:
            right = prediction.rstrip(string.punctuation).lower() == reference.lower()
        if right:
            return 1.0
    return 0.0


def normalize_ocr(text: str) -> str:
    """Lower case, stripped, line breaks as blanks."""
    return text.lower().strip().replace("\n", " ")


def normalize_formula(text: str) -> str:
    """Without any blanks; the case stays."""
    return text.strip().replace("\n", " ").replace(" ", "")


def _contains_any(prediction: str, references: Sequence[str]) -> float:
    return float(any(reference in prediction for reference in references))


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
    "vqa_accuracy_official": Metric(_one_line, _official_vqa, "official"),
    "vqa_accuracy_vlmevalkit": Metric(normalize_vqa_vlmevalkit, _leave_one_out, "vlmevalkit"),
    "textvqa_accuracy": Metric(normalize_textvqa, _leave_one_out, "lmms-0.7.3"),
    "gqa_exact_match": Metric(normalize_gqa, _any_equal, "lmms-0.7.3"),
    "gqa_exact_match_vlmevalkit": Metric(lambda text: text.strip().lower(), _any_equal, "vlmevalkit"),
    "exact_match": Metric(normalize_exact, _any_equal, "vlm_taid"),
    "anls": Metric(str, _anls, "lmms-0.7.3"),
    "relaxed_accuracy": Metric(str, _relaxed, "lmms-0.7.3"),
    "relaxed_accuracy_lm_eval": Metric(str, _relaxed_lm_eval, "lm-eval-0.4.13"),
    "ocrbench": Metric(normalize_ocr, _contains_any, "vlmevalkit"),
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
