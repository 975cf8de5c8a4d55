"""Perplexity, KL and agreement on text: against fp64, and independent of batches, order and ranks."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import families, runs
from vlm_taid.cli import main
from vlm_taid.errors import BadRow, InputError
from vlm_taid.evaluation import Results, evaluate_text, load
from vlm_taid.evaluation.language import Document, Reader, read_documents, text_sums, windows
from vlm_taid.evaluation.language_results import ratio, text_results
from vlm_taid.objectives import Head, HiddenSignal, measure

TEXTS = [
    "what colour is it?",
    "is it teal or orange? it is purple, and what colour is it really?",
    "Привет, 😀",
    "yellow " * 20,
    "it",
]
DOCUMENTS = [Document(f"texts:{number}", text) for number, text in enumerate(TEXTS, 1)]


@pytest.fixture(scope="module")
def student(language_model):
    return Reader(*language_model, "student")


@pytest.fixture(scope="module")
def teacher(language_model):
    """The student with noise on its weights, so that some first choices agree, and 16 rows that no token names."""
    model = copy.deepcopy(language_model[0])
    model.resize_token_embeddings(len(language_model[1]) + 16, mean_resizing=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    return Reader(model, language_model[1], "teacher")


def sums(student, teacher=None, documents=DOCUMENTS, **options):
    options = {"max_length": 16, "stride": 5, "batch_size": 4} | options
    return text_sums(student, documents, teacher=teacher, progress=False, **options)


@torch.no_grad()
def reference(student, teacher, documents, max_length, stride):
    """The same in fp64 from the models' whole logits, one window at a time, without heads and chunks."""
    models = [copy.deepcopy(reader.model).double() for reader in (student, teacher)]
    real = len(student.tokenizer)
    found = torch.zeros(len(documents), 5, dtype=torch.float64)
    for number, document in enumerate(documents):
        ids = student.ids(document)
        stream, end = [student.prefix, *ids], 0
        while end < len(ids):
            start, end = end, min(end + (stride if end else max_length), len(ids))
            inputs = torch.tensor([stream[max(0, end - max_length) : end]])
            logits = [model(input_ids=inputs).logits[0, start - end :] for model in models]
            labels = torch.tensor(stream[start + 1 : end + 1])[:, None]
            log_q, log_t = (values.log_softmax(-1) for values in logits)
            log_p = logits[1][:, :real].log_softmax(-1)
            found[number] += torch.stack(
                [
                    -log_q.gather(-1, labels).sum(),
                    -log_t.gather(-1, labels).sum(),
                    (log_p.exp() * (log_p - log_q)).sum(),
                    (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
                    torch.tensor(end - start),
                ]
            )
    return found


@pytest.mark.parametrize("max_length, stride", [(16, 5), (16, 16), (400, 400)])
def test_sums_are_those_of_fp64(student, teacher, max_length, stride):
    found = sums(student, teacher, max_length=max_length, stride=stride)
    expected = reference(student, teacher, DOCUMENTS, max_length, stride)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
    assert expected[:, 2].min() > 0.1 and 0 < expected[:, 3].sum() < expected[:, 4].sum()
    alone = sums(student, max_length=max_length, stride=stride)
    torch.testing.assert_close(alone[:, [0, 4]], expected[:, [0, 4]], rtol=2e-6, atol=1e-6)


def test_sums_do_not_depend_on_batches_or_order(student, teacher):
    single = sums(student, teacher, batch_size=1)
    for batch_size in (4, 12):
        torch.testing.assert_close(sums(student, teacher, batch_size=batch_size), single, rtol=1e-6, atol=1e-6)
    turned = sums(student, teacher, documents=DOCUMENTS[::-1])
    torch.testing.assert_close(turned.flip(0), single, rtol=1e-6, atol=1e-6)


def of_rank(rank, port, student, teacher, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(sums(student, teacher), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_same(student, teacher, tmp_path):
    mp.start_processes(of_rank, (runs.free_port(), student, teacher, tmp_path), nprocs=2, start_method="fork")
    single = sums(student, teacher)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), single, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "qwen2_vl"])
def test_other_families(family):
    """A soft cap, tied weights and a sliding window; a vision-language model that reads text alone."""
    reader = Reader(*load(families.made(family)))
    double = copy.deepcopy(reader.model).double()
    documents = [Document("a", TEXTS[1]), Document("b", TEXTS[3])]
    found = sums(reader, documents=documents, max_length=64, stride=64)
    for document, row in zip(documents, found, strict=True):
        ids = torch.tensor([[reader.prefix, *reader.ids(document)]])
        with torch.no_grad():
            log_q = double(input_ids=ids[:, :-1]).logits[0].log_softmax(-1)
        assert float(row[0]) == pytest.approx(-float(log_q.gather(-1, ids[0, 1:, None]).sum()), rel=1e-5)


def test_measure_with_a_rest_bucket_in_chunks_of_one_row():
    """Against dense fp64: the rest is one token of the KL, padding stays in the student's normaliser."""
    torch.manual_seed(0)
    hidden, theirs = torch.randn(9, 8), torch.randn(9, 6)
    head = Head(torch.randn(30, 8), columns=torch.tensor([3, 1, 7, 20]), rest=torch.arange(8, 15))
    other = Head(torch.randn(40, 6), softcap=3.0, columns=torch.tensor([0, 5, 2, 9]), rest=torch.arange(20, 39))
    labels, their_labels = torch.randint(30, (9,)), torch.randint(40, (9,))
    found = measure(hidden, head, labels, HiddenSignal(theirs, other), their_labels, memory=1e-6)
    log_q = torch.log_softmax(hidden.double() @ head.weight.double().T, -1)
    own_t = 3 * torch.tanh(theirs.double() @ other.weight.double().T / 3)
    buckets_q, buckets_t = (
        torch.cat([values[:, one.columns], values[:, one.rest].logsumexp(-1, keepdim=True)], -1)
        for values, one in ((log_q, head), (own_t, other))
    )
    log_p = buckets_t.log_softmax(-1)
    same = (log_p.argmax(-1) == buckets_q.argmax(-1)) & (log_p.argmax(-1) < 4)
    expected = [
        -log_q.gather(-1, labels[:, None])[:, 0],
        -own_t.log_softmax(-1).gather(-1, their_labels[:, None])[:, 0],
        (log_p.exp() * (log_p - buckets_q)).sum(-1),
        same.double(),
    ]
    for ours, dense in zip(vars(found).values(), expected, strict=True):
        torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rest"):
        measure(hidden, head, labels, HiddenSignal(theirs, replace(other, rest=None)))


def test_windows_predict_each_token_once_with_the_context_that_is_said():
    for length in (1, 4, 5, 8, 9, 23):
        ids = list(range(100, 100 + length))
        for max_length, stride in ((4, 4), (4, 1), (8, 3)):
            found = list(windows(7, 1, ids, max_length, stride))
            assert [i for window in found for i in window.targets] == ids
            stream = [1, *ids]
            for number, window in enumerate(found):
                assert window.document == 7 and len(window.inputs) <= max_length
                last = stream.index(window.targets[-1])
                assert window.inputs == stream[last - len(window.inputs) : last]
                assert number == 0 or len(window.inputs) - len(window.targets) >= max_length - stride


def test_windows_and_likelihoods_are_those_of_lm_eval(student):
    models = pytest.importorskip("lm_eval.models.huggingface", reason="needs pip install 'vlm-taid[lm-eval]'")
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows

    for length in (1, 4, 5, 9, 23):
        theirs = list(get_rolling_token_windows(list(range(length)), -1, 8, 8 - 3 + 1))
        assert [(window.inputs, window.targets) for window in windows(0, -1, list(range(length)), 8, 3)] == theirs
    lm = models.HFLM(student.model, tokenizer=student.tokenizer, max_length=16, add_bos_token=False, batch_size=2)
    requests = [Instance("loglikelihood_rolling", {}, (document.text,), 0) for document in DOCUMENTS]
    found = torch.tensor(lm.loglikelihood_rolling(requests, disable_tqdm=True), dtype=torch.float64)
    torch.testing.assert_close(-sums(student, stride=16)[:, 0], found, rtol=1e-5, atol=1e-5)


def test_definitions():
    """Two documents by hand: 3 words, 14 bytes (the accent takes two), 5 tokens; surprise log 2 + log 8."""
    documents = [Document("a", "naïve cafe"), Document("b", "now")]
    table = torch.zeros(2, 5, dtype=torch.float64)
    table[:, 0] = torch.tensor([math.log(2), math.log(8)])
    table[:, 2:] = torch.tensor([[3.0, 1.0, 4.0], [0.5, 1.0, 1.0]])
    table[:, 1] = 2 * table[:, 0]
    found = text_results(table, documents, teacher=True)
    assert found["word_perplexity,none"] == pytest.approx(16 ** (1 / 3))
    assert found["byte_perplexity,none"] == pytest.approx(16 ** (1 / 14))
    assert found["bits_per_byte,none"] == pytest.approx(4 / 14)
    assert found["token_perplexity,none"] == pytest.approx(16 ** (1 / 5))
    assert found["teacher_token_perplexity,none"] == pytest.approx(16 ** (2 / 5))
    assert (found["kl,none"], found["top1_agreement,none"]) == (pytest.approx(3.5 / 5), pytest.approx(2 / 5))
    # 0.7 a token: 3 - 4 * 0.7 = 0.2 and 0.5 - 0.7 = -0.2
    assert found["kl_stderr,none"] == pytest.approx(math.sqrt(2 / 1 * (0.2**2 + 0.2**2)) / 5)
    assert "kl,none" not in text_results(table, documents, teacher=False)
    # documents of one length: the standard error of a mean
    values = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    assert ratio(values, torch.ones(4)) == (3.5, pytest.approx(float(values.std() / 2)))
    assert ratio(values[:1], torch.ones(1)) == (1.0, None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, student, teacher):
    root = tmp_path_factory.mktemp("language")
    for name, reader in (("student", student), ("teacher", teacher)):
        reader.model.save_pretrained(root / name)
        reader.processor.save_pretrained(root / name)
    (root / "texts.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    (root / "whole.txt").write_text("\n".join(TEXTS))
    return root


def test_command(folders, capsys):
    arguments = ["eval", "lm", "--model", folders / "student", "--teacher", folders / "teacher"]
    arguments += ["--columns", "text=content", "--max-length", "16", "--stride", "5", "--limit", "4"]
    arguments += ["--data", f"rows={folders / 'texts.jsonl'},book={folders / 'whole.txt'}"]
    found = []
    for name in ("first", "second"):
        assert main([str(a) for a in [*arguments, "--output_path", folders / name]]) == 0
        found.append(Results.load(folders / name))
    assert "top1_agreement" in capsys.readouterr().out
    first, second = (result.data | {"run": None} for result in found)
    assert first == second
    assert first["n-samples"]["rows"] == {"original": 5, "effective": 4}
    assert first["higher_is_better"]["rows"] == {
        "word_perplexity": False, "byte_perplexity": False, "bits_per_byte": False, "token_perplexity": False,
        "kl": False, "top1_agreement": True, "teacher_word_perplexity": False, "teacher_byte_perplexity": False,
        "teacher_bits_per_byte": False, "teacher_token_perplexity": False,
    }  # fmt: skip
    lines = found[0].samples["rows"]
    tokens = sum(line["tokens"] for line in lines)
    result = first["results"]["rows"]
    assert result["kl,none"] == pytest.approx(sum(line["kl"] for line in lines) / tokens)
    surprise = -sum(line["loglikelihood"] for line in lines)
    assert result["word_perplexity,none"] == pytest.approx(
        math.exp(surprise / sum(map(len, map(str.split, TEXTS[:4]))))
    )
    book = first["results"]["book"]
    assert book["sample_len"] == 1 and book["n_bytes"] == len("\n".join(TEXTS).encode())
    assert book["kl_stderr,none"] is None
    written = next((folders / "first").rglob("summary.md")).read_text()
    assert "rows (first 4 of 5 rows)" in written and f"{result['kl,none']:.5g}" in written


def test_what_cannot_be_measured_is_named(student, teacher, folders, tmp_path):
    other = copy.copy(teacher)
    other.tokenizer = families.tokenizer()
    with pytest.raises(InputError, match=r"texts:1: teacher cuts the text into other tokens than student.*byte_perpl"):
        sums(student, other)
    with pytest.raises(InputError, match=r"stride \(20\)"):
        sums(student, stride=20)
    with pytest.raises(InputError, match="max_length is 999999"):
        evaluate_text(student, {"a": "a.txt"}, max_length=999999)
    with pytest.raises(InputError, match=r"limit \(0\)"):
        evaluate_text(student, {"a": "a.txt"}, limit=0)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    for path, message in (
        (empty, "empty"),
        (tmp_path / "gone.txt", "cannot be read"),
        (tmp_path / "a.jsonl", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            read_documents(str(path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(BadRow, match=r"rows.jsonl:2"):
        read_documents(str(rows))
