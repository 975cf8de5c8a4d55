"""Teachers on disk: what is stored is the live teacher's distribution; a run reads it; anything wrong is refused."""

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
import yaml

from tests.families import llama, llava, made, qwen2_5_vl, vqa_rows
from tests.kinds import SAMPLE, kind
from tests.runs import here, metrics, recipe_file
from vlm_taid.caching import cache
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.objectives import Corrections, HiddenSignal
from vlm_taid.objectives.signals import teacher_logits
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import Basis, StoredTokens, bytes_a_token


def with_cache(recipe, folder, name=None):
    """The recipe with ``teacher.cache``, beside it."""
    made = yaml.safe_load(recipe.read_text())
    made["teacher"]["cache"] = str(folder)
    name = name or f"{recipe.stem}_cached"
    made["training"]["output_dir"] = str(recipe.parent / name)
    path = recipe.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def read(stored, basis, has_rest=False):
    """Log-probabilities that a loss sees."""
    found = stored.read()
    corrections = Corrections(found["ids_NK"], found["added_NK"])
    signal = HiddenSignal(found["coefficients_NR"], basis.head(has_rest), corrections)
    return teacher_logits(signal, slice(None)).double().log_softmax(-1)


@pytest.mark.parametrize("size", [300, 151936])
def test_the_likeliest_tokens_and_the_mass_of_the_others_are_stored(size, tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits_NB = torch.randn(40, size, generator=generator) * 3
    logits_NB[0, 7] = 60.0  # a teacher that is certain
    basis = Basis.of(logits_NB.clone(), 8, 16)
    basis.save(tmp_path / "basis.safetensors")
    stored, k = StoredTokens.of(logits_NB, Basis.load(tmp_path / "basis.safetensors"), 32), 32
    true_NK, ids_NK = logits_NB.double().log_softmax(-1).topk(k)
    logp_NB = read(stored, basis)
    assert stored.read()["ids_NK"].equal(ids_NK.sort(-1).values)
    found_NK, tail_N = logp_NB.gather(-1, ids_NK), 1 - true_NK.exp().sum(-1)
    kl_N = (true_NK.exp() * (true_NK - found_NK)).sum(-1)
    found_tail_N = logp_NB.scatter(-1, ids_NK, -torch.inf).exp().sum(-1)
    kl_N += torch.where(tail_N > 1e-9, tail_N * (tail_N / found_tail_N).log(), 0.0)
    assert kl_N.abs().max() < 2e-3
    assert sum(part.nbytes for part in vars(stored).values()) / 40 == bytes_a_token(size, k, 8, 16) <= 256


def low_rank(N, B, R, seed):
    """Logits that lie in R dimensions, the same for every seed."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(B, R, generator=generator), torch.randn(B, generator=generator)
    return torch.randn(N, R, generator=torch.Generator().manual_seed(seed)) @ weight.T + bias


def test_logits_of_low_rank_are_stored_whole():
    """Other positions than the basis was fitted to: their tails too are there, token by token."""
    basis = Basis.of(low_rank(200, 500, 12, seed=2), 12, 0)
    logits_NB = low_rank(30, 500, 12, seed=3)
    off_NB = read(StoredTokens.of(logits_NB, basis, 4), basis) - logits_NB.double().log_softmax(-1)
    assert off_NB.abs().max() < 0.2 and off_NB.square().mean().sqrt() < 0.03
    half = Basis.of(low_rank(200, 500, 12, seed=2), 4, 8)
    off_NB = read(StoredTokens.of(logits_NB, half, 4), half) - logits_NB.double().log_softmax(-1)
    assert 0.05 < off_NB.square().mean().sqrt() < 0.6  # 4 bits a coefficient


def test_a_batch_without_a_token_is_read():
    basis = Basis.of(low_rank(200, 500, 12, seed=2), 4, 8)
    stored = StoredTokens.of(low_rank(3, 500, 12, seed=3), basis, 4)
    empty = replace(stored, **{field.name: getattr(stored, field.name)[:0] for field in fields(stored)})
    assert {name: tuple(part.shape) for name, part in empty.read().items()} == {
        "coefficients_NR": (0, 12), "ids_NK": (0, 4), "added_NK": (0, 4),
    }  # fmt: skip


def test_the_directions_are_those_of_a_dense_svd():
    logits_NB = torch.randn(60, 300, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.1, 2, 300)
    basis = Basis.of(logits_NB.clone(), 6, 4)
    weight_B = basis.weight_B.double()
    logp_NB = logits_NB.double().log_softmax(-1)
    logp_NB -= (logp_NB * weight_B**2).sum(-1, keepdim=True) / (weight_B**2).sum()
    centred_NB = (logp_NB - logp_NB.mean(0)) * weight_B
    _, values, V_NB = torch.linalg.svd(centred_NB, full_matrices=False)
    expected_BR = V_NB[:10].T * values[:10] / 60**0.5
    found_BR = basis.vectors_BR.double() * weight_B[:, None]
    signs_R = (found_BR * expected_BR).sum(0).sign()
    assert ((found_BR * signs_R - expected_BR).norm(dim=0) / expected_BR.norm(dim=0)).max() < 2e-2


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text recipe, and its cache of a teacher whose width all coefficients span."""
    folder = tmp_path_factory.mktemp("text")
    data = vqa_rows(folder / "data", images=False, rows=10)
    recipe = recipe_file(
        folder / "live.yaml", llama(folder / "student", seed=1), llama(folder / "teacher", width=48), data,
        max_steps=4, per_device_train_batch_size=4, use_cpu=True,
    )  # fmt: skip
    return recipe, cache(Recipe.load(recipe), folder / "cache", k=8, rows_per_shard=4, coefficients=(48, 0))


def test_a_run_from_the_cache_is_the_live_run(text):
    recipe, folder = text
    assert len(list(folder.glob("rows-*.safetensors"))) == 3
    live, cached = here(recipe), here(with_cache(recipe, folder))
    for before, after in zip(metrics(live, "kl", "t"), metrics(cached, "kl", "t"), strict=True):
        assert after == pytest.approx(before, rel=2e-2)


@pytest.mark.parametrize("family", [llava, qwen2_5_vl])
def test_pictures_too(family, tmp_path):
    data = vqa_rows(tmp_path / "data", rows=5)
    recipe = recipe_file(
        tmp_path / "live.yaml", family(tmp_path / "student", seed=1), family(tmp_path / "teacher", width=48), data,
        max_steps=2, per_device_train_batch_size=3, use_cpu=True, dataloader_num_workers=1, learning_rate=1e-4,
    )  # fmt: skip
    folder = cache(Recipe.load(recipe), tmp_path / "cache", k=8, coefficients=(48, 0))
    cached = with_cache(recipe, folder)
    for before, after in zip(metrics(here(recipe), "kl"), metrics(here(cached), "kl"), strict=True):
        assert after == pytest.approx(before, rel=2e-2)
    picture = tmp_path / "data" / "3.png"  # another picture under the same name
    shutil.copy(tmp_path / "data" / "0.png", picture)
    with pytest.raises(InputError, match=r"rows\.jsonl:4 was stored in .* for other token ids, positions or pictures"):
        here(with_cache(recipe, folder, "changed"))


def test_a_second_tokenizers_rest_bucket_too(tmp_path):
    folders = [
        made("gemma3", tok=kind("sentencepiece")),
        made("mistral3", tok=kind("byte_level"), seed=1),
    ]
    recipe = recipe_file(
        tmp_path / "live.yaml", *folders, str(SAMPLE / "vqa.jsonl"), max_steps=2, per_device_train_batch_size=3,
        use_cpu=True, learning_rate=1e-4,
    )  # fmt: skip
    content = yaml.safe_load(recipe.read_text())
    content["data"]["train"][0]["limit"] = 6
    recipe.write_text(yaml.safe_dump(content))
    cached = with_cache(recipe, cache(Recipe.load(recipe), tmp_path / "cache", k=8, coefficients=(48, 0)))
    names = ("kl", "teacher_rest_mass")
    before, after = metrics(here(recipe), *names), metrics(here(cached), *names)
    assert len(before) == 2 and all(mass > 1e-3 for _, mass in before)
    for live, stored in zip(before, after, strict=True):
        assert stored == pytest.approx(live, rel=2e-2)


def test_a_stopped_cache_goes_on(text, tmp_path):
    recipe, whole = text
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "rows-000001.safetensors").unlink()
    (part / "rows-000002.safetensors").rename(part / "rows-000002.partial")
    first = (part / "rows-000000.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"rows-000001\.safetensors is missing: run vlm-taid cache again"):
        here(with_cache(recipe, part, "unfinished"))
    cache(Recipe.load(recipe), part, k=8, rows_per_shard=4, coefficients=(48, 0))
    assert (part / "rows-000000.safetensors").stat().st_mtime_ns == first
    for file in whole.iterdir():
        assert (part / file.name).read_bytes() == file.read_bytes()
    assert not list(part.glob("*.partial"))
    with pytest.raises(InputError, match="holds another cache, which differs in k"):
        cache(Recipe.load(recipe), part, k=12, rows_per_shard=4, coefficients=(48, 0))


def test_what_does_not_belong_is_refused(text, tmp_path, capsys):
    recipe, folder = text
    other = with_cache(recipe, folder, "other")
    teacher = llama(tmp_path / "teacher", width=48, seed=3)
    assert main(["distill", "--config", str(other), "--teacher.path", teacher]) == 2
    error = capsys.readouterr().err
    assert "what differs: teacher.weights (" in error and "config" not in error
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text("{{ '' }}" + template.read_text())
    assert main(["distill", "--config", str(other), "--teacher.path", teacher]) == 2
    assert "teacher.chat_template (" in capsys.readouterr().err
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    about = json.loads((old / "cache.json").read_text())
    (old / "cache.json").write_text(json.dumps(about | {"version": 1}))
    assert main(["distill", "--config", str(recipe), "--teacher.cache", str(old)]) == 2
    assert "is of format 1, and 2 is read here: make it again" in capsys.readouterr().err
    more = vqa_rows(tmp_path / "more", images=False, rows=3)
    assert main(["distill", "--config", str(other), "--data.train", json.dumps([{"path": more, "format": "vqa"}])]) == 2
    assert f"lacks 3 rows of this recipe's data, the first is {more}:1" in capsys.readouterr().err


def test_damage_is_found(text, tmp_path):
    recipe, folder = text
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    file = damaged / "rows-000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"bytes in .* are damaged"):
        here(with_cache(recipe, damaged, "damaged"))
    file.write_bytes(bytes(content[:-40]))
    with pytest.raises(InputError, match=r"rows-000000\.safetensors is broken"):
        here(with_cache(recipe, damaged, "cut"))
    content = bytearray((damaged / "basis.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "basis.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"basis\.safetensors is damaged: remove the cache"):
        here(with_cache(recipe, damaged, "basis"))


def test_bad_rows_are_known(text, tmp_path, capsys):
    recipe, _ = text
    rows = [
        {"question": "what?", "answer": "red"},
        {"question": "what?", "answer": ""},
        {"question": "why", "answer": "no"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    given = ["--config", str(recipe), "--data.train", json.dumps([{"path": str(data), "format": "vqa"}])]
    assert main(["cache", *given, "--output", str(tmp_path / "cache"), "--k", "8"]) == 0
    assert main(["cache", *given, "--output", str(tmp_path / "odd"), "--coefficients", "7", "8"]) == 2
    assert "coefficients are 7 and 8: two even numbers" in capsys.readouterr().err
    assert main(["cache", *given, "--output", str(tmp_path / "odd"), "--rows_per_shard", "0"]) == 2
    assert "rows_per_shard is 0: at least 1" in capsys.readouterr().err
    run = ["--teacher.cache", str(tmp_path / "cache"), "--training.output_dir", str(tmp_path / "run")]
    assert main(["distill", *given, *run]) == 0
    assert "1 rows were skipped" in capsys.readouterr().out
