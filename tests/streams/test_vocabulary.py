"""Two vocabularies are compared by what their tokens stand for, and by role; what only one has makes a rest bucket."""

import pytest
import torch

from tests.kinds import KINDS, kind
from vlm_taid.errors import InputError
from vlm_taid.objectives import Head, HiddenSignal, Objective, linear_distillation, per_token
from vlm_taid.streams import SharedVocabulary, StreamEncoder
from vlm_taid.training_log import RestWatch

PAIRS = [
    ("byte_level", "sentencepiece"),
    ("sentencepiece_first", "byte_level_small"),
    ("unigram", "byte_level"),
    ("sentencepiece", "unigram_plain"),
    ("byte_level_small", "byte_level"),
    ("smollm2", "qwen"),
    ("qwen", "sentencepiece"),
]


def text_of(name, i):
    """What a token decodes to, alone, after a token that keeps decoders from stripping its blank."""
    tokenizer = kind(name)
    return tokenizer.decode([tokenizer.convert_tokens_to_ids("a"), i], clean_up_tokenization_spaces=False)[1:]


def special_ids(name):
    added = kind(name).added_tokens_decoder
    return {i for i, token in added.items() if token.special} | set(kind(name).all_special_ids)


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_shared_tokens_decode_to_the_same_text(student, teacher):
    shared = SharedVocabulary(kind(student), kind(teacher))
    specials = [special_ids(name) for name in (student, teacher)]
    assert len(shared) == len(set(shared.to_teacher.values())) > 200
    for i, j in shared.to_teacher.items():
        if i in specials[0] or j in specials[1]:
            assert i in specials[0] and j in specials[1]
        else:
            a, b = text_of(student, i), text_of(teacher, j)
            assert a == b or "\ufffd" in a + b
    assert shared.to_teacher[shared.end_of_turn[0]] == shared.end_of_turn[1]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_no_text_token_is_missed(student, teacher):
    """Every text that one token stands for in both is shared: each id in one list of its model, specials in none."""
    shared = SharedVocabulary(kind(student), kind(teacher))
    rest = (shared.student_rest_R, shared.teacher_rest_R)
    sides = []
    for name, columns, unshared in zip(
        (student, teacher), (shared.student_columns_C, shared.teacher_columns_C), rest, strict=True
    ):
        specials = special_ids(name)
        unshared = set() if unshared is None else set(unshared.tolist())
        assert not unshared & set(columns.tolist()) and not unshared & specials
        if rest[0] is not None:
            assert unshared | set(columns.tolist()) | specials >= set(kind(name).get_vocab().values())
        sides.append({text_of(name, i) for i in unshared if not kind(name).convert_ids_to_tokens(i).startswith("<0x")})
    assert not {text for text in sides[0] & sides[1] if "\ufffd" not in text}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "qwen"])
def test_one_tokenizer_maps_each_id_to_itself(name):
    shared = SharedVocabulary(kind(name), kind(name))
    assert shared.to_teacher == {i: i for i in sorted(kind(name).get_vocab().values())}
    assert shared.student_rest_R is None and shared.teacher_rest_R is None


def test_a_vocabulary_within_another_has_no_rest():
    """The student cannot write what only the teacher has: it is cut, and no bucket teaches other tokens for it."""
    shared = SharedVocabulary(kind("byte_level_small"), kind("byte_level"))
    assert shared.student_rest_R is None and shared.report().teacher_unshared > 0


def test_report():
    report = SharedVocabulary(kind("byte_level"), kind("sentencepiece")).report(examples=4)
    assert report.rest_bucket and report.end_of_turn == ("</s>", "</s>")
    assert ("Ġ", "▁") in report.otherwise_written and ("Ċ", "<0x0A>") not in report.otherwise_written
    for name, tokenizer in (("student", kind("byte_level")), ("teacher", kind("sentencepiece"))):
        own = [getattr(report, f"{name}_{what}") for what in ("unshared", "unshared_special")]
        assert report.shared + sum(own) == getattr(report, f"{name}_tokens") == len(tokenizer)
        assert all(len(tokenizer.tokenize(token)) >= 1 for token in getattr(report, f"{name}_examples"))
    assert f"{report.shared:,} shared tokens" in str(report) and "one rest bucket" in str(report)


def test_special_tokens_pair_by_role():
    """The ends of turn, whatever they are called; others by their strings."""
    shared = SharedVocabulary(kind("smollm2"), kind("qwen"))
    mine, theirs = kind("smollm2"), kind("qwen")
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert shared.to_teacher[mine.convert_tokens_to_ids(token)] == theirs.convert_tokens_to_ids(token)
    other = SharedVocabulary(kind("smollm2"), kind("sentencepiece"))
    assert other.to_teacher[mine.eos_token_id] == kind("sentencepiece").eos_token_id


# -- the rest bucket, with the loss ----------------------------------------------------------------------------------


def heads(student="byte_level", teacher="sentencepiece", pad=7, N=12):
    """Random heads (fp64) of two tokenizers, the student's padded, and hidden states."""
    shared = SharedVocabulary(kind(student), kind(teacher))
    random = torch.Generator().manual_seed(0)
    rows = (len(kind(student)) + pad, len(kind(teacher)))
    weights = [torch.randn(V, 8, generator=random, dtype=torch.float64) * 0.7 for V in rows]
    hidden = [torch.randn(N, 8, generator=random, dtype=torch.float64) for _ in rows]
    return shared, weights, hidden


def dense(shared, weights, hidden, columns):
    """log-probabilities [N, C + 1] over the shared tokens and the rest, of all rows of the head, by hand."""
    logits_NV = hidden @ weights.T
    shared_C, rest_R = columns
    logp_NV = logits_NV.log_softmax(-1)
    return torch.cat([logp_NV[:, shared_C], logp_NV[:, rest_R].exp().sum(-1, keepdim=True).log()], -1)


def test_loss_over_shared_tokens_and_the_rest_equals_fp64_by_hand():
    """KL to the teacher over its tokens in C + 1 buckets; the student's padded rows stay in its normaliser."""
    shared, (mine_VH, theirs_VG), (hidden_NH, hidden_NG) = heads()
    assert shared.student_rest_R is not None and shared.teacher_rest_R is not None
    leaf_NH = hidden_NH.clone().requires_grad_()
    weight_VH = mine_VH.clone().requires_grad_()
    q_NB = dense(shared, weight_VH, leaf_NH, (shared.student_columns_C, shared.student_rest_R))
    p_NB = dense(shared, theirs_VG, hidden_NG, (shared.teacher_columns_C, shared.teacher_rest_R))
    p_NB = p_NB - p_NB.logsumexp(-1, keepdim=True)  # without its specials that are in no bucket
    kl_N = (p_NB.exp() * (p_NB - q_NB)).sum(-1)
    kl_N.sum().backward()

    mine = Head(mine_VH.float().requires_grad_(), columns=shared.student_columns_C, rest=shared.student_rest_R)
    theirs = Head(theirs_VG.float(), columns=shared.teacher_columns_C, rest=shared.teacher_rest_R)
    hidden32_NH = hidden_NH.float().requires_grad_()
    out = linear_distillation(
        hidden32_NH, mine, HiddenSignal(hidden_NG.float(), theirs), Objective.named("fkl"), chunk=5
    )
    out.loss_N.sum().backward()
    assert torch.allclose(out.kl_N.double(), kl_N.detach(), rtol=1e-4, atol=1e-5)
    for ours, reference in ((hidden32_NH.grad, leaf_NH.grad), (mine.weight.grad, weight_VH.grad)):
        assert ours is not None and reference is not None
        assert (ours.double() - reference).norm() < 1e-5 * reference.norm()
    rest_R = shared.student_rest_R
    assert weight_VH.grad is not None and mine.weight.grad is not None
    assert (mine.weight.grad[rest_R].double() - weight_VH.grad[rest_R]).norm() < 1e-5 * weight_VH.grad[rest_R].norm()
    assert mine.weight.grad[rest_R].norm() > 0, "the gradient reaches the rest's rows"
    expected_N = shared.teacher_rest_mass(hidden_NG @ theirs_VG.T)
    assert out.rest_N is not None and torch.allclose(out.rest_N, p_NB[:, -1].exp().float(), atol=1e-5)
    assert torch.allclose(expected_N.float(), out.rest_N, atol=1e-5)


def test_an_unshared_label_is_the_rest_bucket():
    """Objectives on labels: the student's next token in the C + 1 buckets, and its cross-entropy there in fp64."""
    shared, (mine_VH, theirs_VG), (hidden_NH, hidden_NG) = heads(pad=0)
    assert shared.student_rest_R is not None
    mine = Head(mine_VH.float(), columns=shared.student_columns_C, rest=shared.student_rest_R)
    theirs = Head(theirs_VG.float(), columns=shared.teacher_columns_C, rest=shared.teacher_rest_R)
    random = torch.Generator().manual_seed(1)
    known = torch.randint(len(shared), (6,), generator=random)
    labels_N = torch.cat([shared.student_columns_C[known], shared.student_rest_R[:6]])
    buckets_N = torch.cat([known, torch.full((6,), len(shared))])
    assert torch.equal(mine.buckets_of(labels_N), buckets_N)

    def by_hand(hidden_NH):
        """dkd's target-class part over the buckets, from probabilities."""
        return per_token("dkd", mine64(hidden_NH), teacher_NB, labels_N=buckets_N)

    def mine64(hidden_NH):
        logits_NV = hidden_NH @ mine_VH.T
        rest_N1 = logits_NV[:, shared.student_rest_R].logsumexp(-1, keepdim=True)
        return torch.cat([logits_NV[:, shared.student_columns_C], rest_N1], -1)

    logits_NV = hidden_NG @ theirs_VG.T
    teacher_NB = torch.cat(
        [logits_NV[:, shared.teacher_columns_C], logits_NV[:, shared.teacher_rest_R].logsumexp(-1, keepdim=True)], -1
    )
    p_NB, q_NB = teacher_NB.softmax(-1), mine64(hidden_NH).softmax(-1)
    p_N, q_N = (x_NB.gather(-1, buckets_N[:, None])[:, 0] for x_NB in (p_NB, q_NB))
    target_N = p_N * (p_N / q_N).log() + (1 - p_N) * ((1 - p_N) / (1 - q_N)).log()
    out = linear_distillation(
        hidden_NH.float(), mine, HiddenSignal(hidden_NG.float(), theirs), Objective.named("dkd", non_target_weight=0.0),
        labels_N=labels_N,
    )  # fmt: skip
    outside_N = -((hidden_NH @ mine_VH.T).log_softmax(-1)[
        :, torch.cat([shared.student_columns_C, shared.student_rest_R])
    ].logsumexp(-1))  # fmt: skip
    assert torch.allclose(out.loss_N.double(), target_N + outside_N, rtol=1e-4, atol=1e-5)
    whole = linear_distillation(
        hidden_NH.float(), mine, HiddenSignal(hidden_NG.float(), theirs), Objective.named("dkd"), labels_N=labels_N
    )
    assert torch.allclose(whole.loss_N.double(), by_hand(hidden_NH) + outside_N, rtol=1e-4, atol=1e-5)


def test_rest_watch_warns_once_and_refuses():
    watch = RestWatch()
    assert watch.add(60.0, 100.0) is None, "too few tokens to judge"
    assert "20%" in (watch.add(60.0, 500.0) or "")
    assert watch.add(200.0, 400.0) is None
    with pytest.raises(InputError, match=r"6\d% of the teacher's probability"):
        watch.add(1500.0, 2000.0)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = kind("byte_level")
    template, tokenizer.chat_template = tokenizer.chat_template, "{{- messages[0]['content'] -}}"
    try:
        with pytest.raises(InputError):
            SharedVocabulary(StreamEncoder(tokenizer), kind("sentencepiece"))
    finally:
        tokenizer.chat_template = template
