"""What `eval lm` found on held-out text: perplexities, KL and agreement with their standard errors, in results files.

Legend of shapes: D documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from vlm_taid.evaluation.language import SUMS, Document
from vlm_taid.evaluation.readers import text_sha256
from vlm_taid.evaluation.results import Results

LOWER_IS_BETTER = ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity", "kl")


def ratio(sums_D: Tensor, counts_D: Tensor) -> tuple[float, float | None]:
    """sum / count, and its standard error with documents as the units: sqrt(D / (D - 1) sum (x - r n)^2) / sum n.

    (The linearised variance of a ratio, Cochran, Sampling Techniques, 1977, 6.4; None for one document: tokens of one
    text are not independent.)

    Args:
        sums_D, counts_D: each document's.
    """
    D, total = len(sums_D), counts_D.sum()
    value = sums_D.sum() / total
    if D < 2:
        return float(value), None
    squares = (sums_D - value * counts_D).square().sum()
    return float(value), float((D / (D - 1) * squares).sqrt() / total)


def perplexities(nll_D: Tensor, counts: Mapping[str, Tensor]) -> dict[str, float | None]:
    """exp(surprise per word, byte, token) and bits per byte, each with its standard error (of an exp: times it).

    Args:
        nll_D: each document's surprise in nats.
        counts: of words, bytes and tokens in each document, [D].
    """
    found: dict[str, float | None] = {}
    for unit, counts_D in counts.items():
        mean, error = ratio(nll_D, counts_D)
        value = math.exp(mean) if mean < 709 else math.inf
        found |= _metric(f"{unit}_perplexity", value, None if error is None else error * value)
        if unit == "byte":
            bit = math.log(2)
            found |= _metric("bits_per_byte", mean / bit, None if error is None else error / bit)
    return found


def text_results(sums_D5: Tensor, documents: Sequence[Document], *, teacher: bool) -> dict[str, Any]:
    """The entry of a text under ``results``: each metric as ``name,none`` and ``name_stderr,none``.

    ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte`` and ``token_perplexity`` are over all of the text,
    its first token too: exp(-sum of log p / number of words between blanks, UTF-8 bytes, tokens). ``kl`` is the mean of
    KL(teacher || student) a token, in nats; ``top1_agreement`` the share of tokens where both models would choose the
    same; ``teacher_...`` are the teacher's perplexities.

    Args:
        sums_D5: of `text_sums`.
        documents: the same.
        teacher: whether there was one.
    """
    sums = dict(zip(SUMS, sums_D5.T, strict=True))
    counts = {
        "word": torch.tensor([document.words for document in documents], dtype=torch.float64),
        "byte": torch.tensor([document.bytes for document in documents], dtype=torch.float64),
        "token": sums["tokens"],
    }
    found = perplexities(sums["nll"], counts)
    if teacher:
        found |= _metric("kl", *ratio(sums["kl"], sums["tokens"]))
        found |= _metric("top1_agreement", *ratio(sums["same_top"], sums["tokens"]))
        found |= {f"teacher_{name}": value for name, value in perplexities(sums["teacher_nll"], counts).items()}
    totals = {f"n_{unit}s": int(counts_D.sum()) for unit, counts_D in counts.items()}
    return found | {"sample_len": len(documents), **totals, "n_errors": 0}  # an error stops the run


def _metric(name: str, value: float, stderr: float | None) -> dict[str, float | None]:
    return {f"{name},none": value, f"{name}_stderr,none": stderr}


def text_samples(sums_D5: Tensor, documents: Sequence[Document], *, teacher: bool) -> list[dict[str, Any]]:
    """A line for each document: its counts and its sums, log-likelihoods in nats."""
    lines = []
    for number, (document, row) in enumerate(zip(documents, sums_D5.tolist(), strict=True)):
        nll, teacher_nll, kl, same_top, tokens = row
        line = {
            "doc_id": number,
            "doc": {"row": document.row},
            "doc_hash": text_sha256(document.text),
            "loglikelihood": -nll,
            "tokens": int(tokens),
            "words": document.words,
            "bytes": document.bytes,
        }
        beside = {"teacher_loglikelihood": -teacher_nll, "kl": kl, "same_top": int(same_top)}
        lines.append(line | beside if teacher else line)
    return lines


class TextResults(Results):
    """Results on texts: several metrics of one text, none of them in percent."""

    def lines(self) -> list[tuple[str, ...]]:
        """(text, metric, value with its standard error, the teacher's, documents), as texts, in order."""
        return [
            (self.label(text), metric, *(_shown(found, f"{prefix}{metric}") for prefix in ("", "teacher_")), documents)
            for text, found in self.data["results"].items()
            for documents in [str(found["sample_len"])]
            for metric in (*LOWER_IS_BETTER, "top1_agreement")
            if f"{metric},none" in found
        ]

    def table(self) -> Table:
        """The values, to be printed with rich."""
        table = Table("text", "metric", "value", "teacher", "documents", title=self.title())
        for line in self.lines():
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """The values, as a Markdown table."""
        head = f"# {self.title()}\n\n| text | metric | value | teacher | documents |\n|---|---|---:|---:|---:|\n"
        return head + "".join(f"| {' | '.join(line)} |\n" for line in self.lines())


def _shown(found: Mapping[str, Any], metric: str) -> str:
    if f"{metric},none" not in found:
        return ""
    stderr = found[f"{metric}_stderr,none"]
    return f"{found[f'{metric},none']:.5g}" + ("" if stderr is None else f" ± {stderr:.2g}")
