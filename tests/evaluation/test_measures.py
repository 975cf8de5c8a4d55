"""Numbers of texts and of lm-eval's tasks beside benchmarks: directions, units, paired differences."""

import json
import math

import pytest
import torch

from tests.evaluation.test_results import make
from vlm_taid.errors import InputError
from vlm_taid.evaluation import compare, compare_command
from vlm_taid.evaluation.language import Document
from vlm_taid.evaluation.language_results import TextResults, text_results, text_samples
from vlm_taid.evaluation.measures import Measure, difference, measures
from vlm_taid.evaluation.results import Results
from vlm_taid.evaluation.tables import differences_table

DOCUMENTS = [Document(f"a.txt:{n}", "word " * (3 + n)) for n in range(6)]
BOTH = ("teacher", "student")


def text(name, noise, *, teacher="models/big", tokens=(4, 5, 6, 7, 8, 9), stride=16):
    """Results of six documents with sums (nll, teacher's nll, kl, same top, tokens) drawn from a seed."""
    draw = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(noise))
    tokens_D = torch.tensor(tokens, dtype=torch.float64)
    sums_D5 = torch.stack(
        [
            draw[:, 0] * 9 + 2 * tokens_D,
            2 * tokens_D,
            draw[:, 2] * tokens_D,
            (draw[:, 3] * tokens_D).floor(),
            tokens_D,
        ],
        -1,
    )
    found = {"alias": "leads"} | text_results(sums_D5, DOCUMENTS, teacher=teacher is not None)
    data = Results.of(
        {}, {}, {}, model_name=name, config={"limit": None, "num_params": 5}, chat_template=None, run={"date": name}
    ).data
    better = {"byte_perplexity": False, "kl": False, "top1_agreement": True}
    data |= {
        "results": {"leads": found},
        "configs": {"leads": {"metric": "kl", "teacher": teacher, "max_length": 16, "stride": stride}},
        "higher_is_better": {"leads": better},
        "n-samples": {"leads": {"original": 6, "effective": 6}},
    }
    return TextResults(data, {"leads": text_samples(sums_D5, DOCUMENTS, teacher=teacher is not None)})


def lm_eval(folder, name, right, logs):
    """Files as lm-eval 0.4 writes them: a multiple-choice task under two filters, a text, and a score of all rows."""
    found = {
        "name": "mc", "alias": "mc", "sample_len": len(right), "acc,none": sum(right) / len(right),
        "acc_stderr,none": 0.1, "acc,strict": 0.0, "acc_stderr,strict": "N/A", "mcc,none": 0.25,
        "mcc_stderr,none": "N/A",
    }  # fmt: skip
    total = sum(log for log, _ in logs) / sum(words for _, words in logs)
    rolling = {"alias": "wiki", "sample_len": len(logs), "bits_per_byte,none": -total / math.log(2)}
    data = {
        "results": {"mc": found, "wiki": rolling},
        "configs": {"mc": {"task": "mc"}, "wiki": {"task": "wiki"}},
        "higher_is_better": {"mc": {"acc": True, "mcc": True}, "wiki": {"bits_per_byte": False}},
        "n-samples": {}, "config": {"model": "hf", "model_num_parameters": 7_000_000}, "model_name": name,
    }  # fmt: skip
    (folder / "results_2026.json").write_text(json.dumps(data))
    lines = [
        {"doc_id": n, "filter": variant, "doc_hash": f"h{n}", "acc": value if variant == "none" else 0, "mcc": [n, 1]}
        for variant in ("none", "strict")
        for n, value in reversed([*enumerate(right)])
    ]
    (folder / "samples_mc_2026.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"doc_id": n, "filter": "none", "bits_per_byte": pair} for n, pair in enumerate(logs)]
    (folder / "samples_wiki_2026.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def names(results):
    return {measure.name.split()[0]: measure for measure in measures(results)}


def test_names_directions_and_units():
    results = text("student", 1)
    assert [measure.heading for measure in measures(results)] == [
        "leads: byte_perplexity ↓", "leads: kl to big ↓", "leads: top1_agreement with big",
    ]  # fmt: skip
    found = results.data["results"]["leads"]
    shown = {name: str(measure.of(results)) for name, measure in names(results).items()}
    assert shown["kl"] == f"{found['kl,none']:.4g} ± {found['kl_stderr,none']:.2g}"
    assert shown["top1_agreement"].startswith(f"{100 * found['top1_agreement,none']:.1f} ± ")
    assert [measure.heading for measure in measures(make(["yes"]))] == ["colors"]


@pytest.mark.parametrize("metric", ["byte_perplexity", "kl", "top1_agreement"])
def test_paired_difference_is_the_jackknifes(metric):
    """The linearised error against leaving out one document at a time, which is another road to the same number."""
    a, b = text("teacher", 1), text("student", 2)
    measure = names(b)[metric]
    found = difference(a, b, measure, BOTH)

    def without(place):
        values = []
        for results in (a, b):
            lines = [line for n, line in enumerate(results.samples["leads"]) if n != place]
            sums = {
                key: sum(line[key] for line in lines) for key in ("loglikelihood", "bytes", "kl", "same_top", "tokens")
            }
            values.append({
                "byte_perplexity": math.exp(-sums["loglikelihood"] / sums["bytes"]),
                "kl": sums["kl"] / sums["tokens"], "top1_agreement": sums["same_top"] / sums["tokens"],
            }[metric])  # fmt: skip
        return values[1] - values[0]

    assert found.score.value == pytest.approx(measure.of(b).value - measure.of(a).value)
    left_out = torch.tensor([without(place) for place in range(6)], dtype=torch.float64)
    jackknife = float((5 / 6 * (left_out - left_out.mean()).square().sum()).sqrt())
    assert found.score.stderr == pytest.approx(jackknife, rel=0.15) and found.score.stderr > 0
    assert difference(a, a, measure, BOTH).score == type(found.score)(0.0, 0.0, 6, measure.of(a).percent)


def test_the_lower_one_is_better():
    a, b = text("teacher", 1), text("student", 2)
    for metric, key, sign in (
        ("kl", "kl", -1),
        ("top1_agreement", "same_top", 1),
        ("byte_perplexity", "loglikelihood", 1),
    ):
        found = difference(a, b, names(b)[metric], BOTH)
        pairs = zip(a.samples["leads"], b.samples["leads"], strict=True)
        gaps = [sign * (y[key] - x[key]) for x, y in pairs]
        assert (found.better_a, found.better_b) == (sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps))
        assert found.better_a + found.better_b > 0


def test_what_cannot_be_compared(tmp_path):
    a, measure = text("teacher", 1), names(text("student", 2))["byte_perplexity"]
    with pytest.raises(InputError, match="by max_length 16, stride 4 and by max_length 16, stride 16"):
        difference(a, text("student", 2, stride=4), measure, BOTH)
    other = text("student", 2)
    other.samples["leads"][3]["doc_hash"] = "another text"
    with pytest.raises(InputError, match="leads: student and teacher did not answer the same questions"):
        difference(a, other, measure, BOTH)
    other.samples["leads"] = []
    assert difference(a, other, measure, BOTH) is None
    for name, teacher in (("one", "models/big"), ("two", "models/bigger"), ("three", None)):
        text(name, 1, teacher=teacher).save(tmp_path)
    _, rows = differences_table(compare([tmp_path]))
    seen = [["three", "leads: byte_perplexity ↓"], ["two", "leads: byte_perplexity ↓"]]
    assert [row[:2] for row in rows] == seen
    other = text("four", 3)
    other.samples["leads"][3]["doc_hash"] = "another text"
    other.save(tmp_path)
    with pytest.raises(InputError, match="did not answer the same questions"):
        differences_table(compare([tmp_path], "one"))
    _, rows = differences_table(compare([tmp_path], "one"), leave_out=True)
    assert [row[:2] for row in rows] == seen  # as a report does


def test_texts_beside_benchmarks(tmp_path):
    for number, name in enumerate(BOTH):
        text(name, number).save(tmp_path)
        make(["yes", "no"] * 3 if number else ["yes"] * 6, name=name).save(tmp_path)
    table = compare_command([str(tmp_path / name) for name in BOTH], "md")
    columns = "colors | leads: byte_perplexity ↓ | leads: kl to big ↓ | leads: top1_agreement with big"
    assert table.splitlines()[0] == f"| model | {columns} |"  # no average of different things
    assert "| student | leads: kl to big ↓ | 6 | " in table
    assert r"kl to big $\downarrow$" in compare_command([str(tmp_path / name) for name in BOTH], "latex")
    head, rows = compare([tmp_path / name for name in BOTH]).table()
    assert "colors: all" in head and "leads: kl to big ↓" in head and len({*map(len, rows), len(head)}) == 1


def test_lm_evals_own_files(tmp_path):
    folders = []
    for name, right, logs in (
        ("teacher", [1, 1, 1, 0], [[-8.0, 4], [-6.0, 3]]),
        ("student", [1, 0, 0, 0], [[-9.0, 4], [-6.5, 3]]),
    ):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        lm_eval(folders[-1], name, right, logs)
    comparison = compare(folders)
    head, rows = comparison.table()
    assert head == ["model", "parameters", "mc: acc", "mc: acc (strict)", "mc: mcc", "wiki: bits_per_byte ↓"]
    assert rows[1] == ["student", "7.00 M", "25.0 ± 10.0", "0.0", "0.25", "3.195"]
    _, rows = differences_table(comparison)
    assert [row[1:] for row in rows] == [
        ["mc: acc", "4", "-50.0 ± 28.9", "2", "0", "0.5"],
        ["mc: acc (strict)", "4", "0.0 ± 0.0", "0", "0", "1"],
        ["wiki: bits_per_byte ↓", "2", rows[2][3], "2", "0", "0.5"],
    ]  # and none of mcc, which is no mean of rows
    assert rows[2][3].startswith(f"+{1.5 / 7 / math.log(2):.4g} ± ")
    assert Measure("mc", "acc").of(Results.load(folders[0])).stderr == 0.1
