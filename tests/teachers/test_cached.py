"""Teachers on disk: what is stored is the live teacher's distribution; a run reads it; anything wrong is refused."""

import json
import shutil

import pytest
import torch
import yaml

from tests.families import llama, llava, qwen2_5_vl, vqa_rows
from tests.runs import here, metrics, recipe_file
from vlm_taid.caching import cache
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import StoredTokens


def with_cache(recipe, folder, name=None):
    """The recipe with ``teacher.cache``, beside it."""
    made = yaml.safe_load(recipe.read_text())
    made["teacher"]["cache"] = str(folder)
    name = name or f"{recipe.stem}_cached"
    made["training"]["output_dir"] = str(recipe.parent / name)
    path = recipe.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


@pytest.mark.parametrize("size", [300, 151936])
def test_stored_tokens_are_the_distribution(size):
    generator = torch.Generator().manual_seed(0)
    logits_NB = torch.randn(40, size, generator=generator) * 3
    logits_NB[0, 7] = 60.0  # a teacher that is certain
    stored, K = StoredTokens.of(logits_NB, 64), 64
    signal, logp_NB = stored.signal(), logits_NB.double().log_softmax(-1)
    assert signal.ids_NK.equal(logp_NB.topk(K).indices)
    assert (signal.logp_NK.exp().sum(-1) + signal.tail_N - 1).abs().max() < 1e-5
    true_NK = logp_NB.topk(K).values
    tail_N = 1 - true_NK.exp().sum(-1)
    stored_NK = signal.logp_NK.double()
    kl_N = (true_NK.exp() * (true_NK - stored_NK)).sum(-1)
    kl_N += torch.where(tail_N > 1e-9, tail_N * (tail_N / signal.tail_N.double()).log(), 0.0)
    assert kl_N.abs().max() < 2e-3
    bytes_a_token = sum(getattr(stored, part).nbytes for part in ("low_NK", "high_NQ", "code_NK", "scale_N2")) / 40
    assert bytes_a_token == (8 + 3 * 64 if size <= 2**16 else 8 + 3.25 * 64) <= 256


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text recipe, and its cache with so many tokens that the tail is small."""
    folder = tmp_path_factory.mktemp("text")
    data = vqa_rows(folder / "data", images=False, rows=10)
    recipe = recipe_file(
        folder / "live.yaml", llama(folder / "student", seed=1), llama(folder / "teacher", width=48), data,
        max_steps=4, per_device_train_batch_size=4, use_cpu=True,
    )  # fmt: skip
    return recipe, cache(Recipe.load(recipe), folder / "cache", k=396, rows_per_shard=4)


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
    folder = cache(Recipe.load(recipe), tmp_path / "cache", k=380)
    cached = with_cache(recipe, folder)
    for before, after in zip(metrics(here(recipe), "kl"), metrics(here(cached), "kl"), strict=True):
        assert after == pytest.approx(before, rel=2e-2)
    picture = tmp_path / "data" / "3.png"  # another picture under the same name
    shutil.copy(tmp_path / "data" / "0.png", picture)
    with pytest.raises(InputError, match=r"rows\.jsonl:4 was stored in .* for other token ids, positions or pictures"):
        here(with_cache(recipe, folder, "changed"))


def test_a_stopped_cache_goes_on(text, tmp_path):
    recipe, whole = text
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "rows-000001.safetensors").unlink()
    (part / "rows-000002.safetensors").rename(part / "rows-000002.partial")
    first = (part / "rows-000000.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"rows-000001\.safetensors is missing: run vlm-taid cache again"):
        here(with_cache(recipe, part, "unfinished"))
    cache(Recipe.load(recipe), part, k=396, rows_per_shard=4)
    assert (part / "rows-000000.safetensors").stat().st_mtime_ns == first
    for file in whole.iterdir():
        assert (part / file.name).read_bytes() == file.read_bytes()
    assert not list(part.glob("*.partial"))
    with pytest.raises(InputError, match="holds another cache, which differs in k"):
        cache(Recipe.load(recipe), part, k=8, rows_per_shard=4)


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
    run = ["--teacher.cache", str(tmp_path / "cache"), "--training.output_dir", str(tmp_path / "run")]
    assert main(["distill", *given, *run]) == 0
    assert "1 rows were skipped" in capsys.readouterr().out
