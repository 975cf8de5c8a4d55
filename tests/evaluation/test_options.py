"""`--model_args` and `--gen_kwargs`, spelled as lm-eval's: what they do, what is refused, what the results say."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import families
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Results, load, run_command
from vlm_taid.evaluation.generation import Generation, generation_options
from vlm_taid.pretrained import ModelOptions, load_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return families.vqa_rows(tmp_path_factory.mktemp("rows"), rows=4)


@pytest.fixture(scope="module")
def model():
    return families.made("llava")


def run(model, data, **options):
    words = {"metric": "exact_match", "num_workers": 0, "max_new_tokens": 6} | options
    return run_command(model, f"rows={data}", **{key: value for key, value in words.items() if value is not None})


def answers(results):
    return [line["filtered_resps"][0] for line in results.samples["rows"]]


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Adapters that change the model, and a model with the same added to its weights."""
    folder = tmp_path_factory.mktemp("adapters")
    adapted = get_peft_model(load_model(ModelOptions(model)), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(folder / "adapters")
    families.save(folder / "merged", adapted.merge_and_unload(), load(model)[1])
    return str(folder / "adapters"), str(folder / "merged")


def test_adapters_are_added(model, adapters, data, tmp_path):
    own = answers(run(model, data))
    command = ["eval", "run", "--model", model, "--data", f"rows={data}", "--metric", "exact_match"]
    command += ["--num-workers", "0", "--model-args", f"peft={adapters[0]},attn_implementation=eager"]
    assert main([*command, "--gen-kwargs", "max_new_tokens=6", "--output-path", str(tmp_path)]) == 0
    adapted = Results.load(tmp_path)
    assert answers(adapted) == answers(run(adapters[1], data)) != own
    assert adapted.data["config"]["model_args"] == f"pretrained={model},peft={adapters[0]},attn_implementation=eager"
    assert adapted.data["config"]["gen_kwargs"] == {"max_new_tokens": "6"}


def test_adapters_that_do_not_fit(model, adapters, tmp_path):
    with pytest.raises(InputError, match=r"peft .*nothing: no adapter_config\.json"):
        load(model, peft=str(tmp_path / "nothing"))
    (tmp_path / "adapter_config.json").write_text((tmp_path / adapters[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        load(model, peft=str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    weights = (tmp_path / adapters[0] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    for targets in (["query"], ["q_proj", "down_proj", "up_proj"]):  # no such layer; a layer that has no weights there
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
        with pytest.raises(InputError, match="cannot be added to the model"):
            load(model, peft=str(tmp_path))


def test_how_the_model_is_loaded(model, data):
    results = run(model, data, model_args="dtype=bfloat16,trust_remote_code=false", gen_kwargs="num_beams=3")
    assert results.data["config"]["dtype"] == "bfloat16"
    assert results.data["configs"]["rows"]["generation_kwargs"] == {
        "max_new_tokens": 6, "do_sample": False, "num_beams": 3
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(model, data, limit=1).data["config"]["gen_kwargs"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_args": "dtyp=float32"}, "--model_args: unknown key 'dtyp'; known: attn_implementation, dtype, peft"),
        ({"model_args": "pretrained=x"}, "give it as --model x"),
        ({"model_args": "dtype=float32", "dtype": "float16"}, "--model_args dtype=float32 and --dtype"),
        ({"model_args": "dtype"}, "'dtype' is not NAME=VALUE"),
        ({"model_args": "trust_remote_code=maybe"}, "expected true or false"),
        ({"model_args": "revision=v2"}, "is a folder, revisions are the hub's"),
        ({"gen_kwargs": "max_tokens=3"}, "--gen_kwargs: unknown key 'max_tokens'; known: max_new_tokens, num_beams"),
        ({"gen_kwargs": "max_new_tokens=3"}, "--gen_kwargs max_new_tokens=3 and --max_new_tokens"),
        ({"gen_kwargs": "num_beams=two"}, "num_beams is 'two', expected a whole number"),
        ({"gen_kwargs": "num_beams=0"}, "num_beams is 0"),
        ({"gen_kwargs": "temperature=0.7"}, "answers are greedy here"),
        ({"gen_kwargs": "do_sample=True"}, "answers are greedy here"),
    ],
)
def test_what_is_refused(model, data, options, message):
    with pytest.raises(InputError, match=message):
        run(model, data, **options)


def test_words_of_generation():
    greedy = {"do_sample": False, "temperature": 0.7, "top_p": None, "max_gen_toks": "32", "until": "\n"}
    assert Generation(**generation_options(greedy, "here")) == Generation(32, until=["\n"])
    assert generation_options({"do_sample": "true", "temperature": "0"}, "here") == {}
    with pytest.raises(InputError, match="are the same"):
        generation_options({"max_gen_toks": 1, "max_new_tokens": 1}, "here")
    with pytest.raises(InputError, match="repetition_penalty"):
        Generation(repetition_penalty=0)


def test_answers_end_at_a_stop(model, data):
    whole = answers(run(model, data))
    letter = next(character for character in whole[0][1:] if character.isalpha())
    assert answers(run(model, data, gen_kwargs=f"until={letter}")) == [text.split(letter)[0].strip() for text in whole]


def test_greedy_whatever_the_model_says(model, data, tmp_path):
    """Many models come with a generation config that draws."""
    own = answers(run(model, data))
    loaded, processor = load(model)
    families.save(tmp_path, loaded, processor)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    drawing = {"do_sample": True, "temperature": 9.0, "top_k": 3, "num_beams": 4, "repetition_penalty": 9.0}
    drawing |= {"no_repeat_ngram_size": 1, "max_length": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(config | drawing))
    assert answers(run(str(tmp_path), data)) == own


def test_a_revision_of_the_hub(model, data, tmp_path, monkeypatch):
    """Two revisions in a local cache: the default one has no weights."""
    from pathlib import Path

    repository = tmp_path / "models--some--tiny"
    for revision, names in (("main", ["config.json"]), ("v2", [file.name for file in Path(model).iterdir()])):
        snapshot = repository / "snapshots" / (revision * 20)[:40].replace("main", "abcd").replace("v2", "ab")
        snapshot.mkdir(parents=True)
        for name in names:
            (snapshot / name).write_bytes((Path(model) / name).read_bytes())
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="cannot be loaded"):
        load("some/tiny")
    results = run("some/tiny", data, model_args="revision=v2")
    assert answers(results) == answers(run(model, data))
    assert results.data["config"]["model_args"] == "pretrained=some/tiny,revision=v2"
