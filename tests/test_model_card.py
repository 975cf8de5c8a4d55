"""The model card is what the hub reads: front matter, licences, scores as a model-index; checkpoints have one too."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import AutoModelForImageTextToText, TrainerState

from tests import families, runs
from vlm_taid import Recipe
from vlm_taid.checkpoints import MANIFEST
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Results, add_scores
from vlm_taid.model_card import METHODS, model_card
from vlm_taid.recipe import ObjectiveOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("card")


@pytest.fixture(scope="module")
def recipe(root):
    """A pair whose student and teacher come with cards of their own."""
    student, teacher = (families.fast_vlm(root / name, seed=seed) for seed, name in enumerate(("student", "teacher")))
    (Path(student) / "README.md").write_text("---\nlicense: mit\nbase_model: some/vlm-2b\n---\n# A student\n")
    (Path(teacher) / "README.md").write_text("---\nlicense: other\nlicense_name: special\n---\n# A teacher\n")
    data = families.vqa_rows(root / "data")
    path = root / "recipe.yaml"
    sections = {
        "student": {"path": student},
        "teacher": {"path": teacher, "dtype": "float32"},
        "data": {"train": [{"path": data, "format": "vqa"}]},
        "training": {
            "output_dir": str(root / "run"),
            "max_steps": 2,
            "save_steps": 1,
            "logging_steps": 1,
        },
    }
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture(scope="module")
def run(recipe):
    return runs.here(recipe)


def test_front_matter_as_the_hub_parses_it(run):
    for folder in (run, run / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-text-to-text")
        assert card.data.license == "mit" and card.data.base_model == "some/vlm-2b"
        assert card.data.tags == ["vlm-taid", "distillation", "taid", "arxiv:2501.16937"]
        assert card.data.eval_results is None and "datasets" not in card.data.to_dict()
        assert "licence special" in card.text and "(vqa), licence not stated" in card.text
        assert "2501.16937" in card.text and "AutoModelForImageTextToText" in card.text
        settings = card.text.split("```yaml\n")[1].split("```")[0]
        assert yaml.safe_load(settings) == yaml.safe_load((run / "recipe.yaml").read_text())
    assert "nats per answer token" in (run / "README.md").read_text()
    assert "optimizer steps: 1 of 2" in (run / "checkpoint-1" / "README.md").read_text()
    assert "README.md" in (run / "checkpoint-1" / MANIFEST).read_text()


def test_eval_run_fills_the_scores_in(run, root):
    def card():
        return ModelCard.load(run / "README.md")

    arguments = ["eval", "run", "--model", str(run), "--data", f"squares={root / 'data' / 'rows.jsonl'}"]
    arguments += ["--metric", "exact_match", "--max_new_tokens", "3", "--output_path", str(root / "results")]
    before = (run / "README.md").read_text()
    for partial in (["--limit", "3"], ["--shuffle_images", "true"]):
        assert main([*arguments, *partial]) == 0
        assert (run / "README.md").read_text() == before  # these are no scores of the model
    assert main(arguments) == 0
    (found,) = card().data.eval_results
    results = Results.load(sorted(root.rglob("results_*.json"))[-1])
    assert found.metric_value == round(100 * results.score("squares").value, 3) and found.metric_args["rows"] == 8
    assert (found.dataset_name, found.dataset_type, found.metric_type) == ("squares", "squares", "exact_match")
    assert f"| squares | exact_match | {found.metric_config} | {results.score('squares')} | 8 |" in card().text
    assert ModelCard(str(card())).data.to_dict() == card().data.to_dict()  # what is written is what is read
    assert "runs" not in json.dumps(card().data.to_dict()) and str(root) not in json.dumps(card().data.to_dict())

    results.data["results"]["squares"]["exact_match,none"] = 0.5
    add_scores(run, results)  # newer scores replace older ones, other tasks' stay
    for part in ("results", "configs", "higher_is_better"):
        results.data[part] = {"more": results.data[part]["squares"]}
    assert add_scores(run, results) == run / "README.md"
    results.data["results"]["more"] |= {"exact_match,none": 0.75, "n_errors": 1}
    assert add_scores(run, results) is None  # a row failed: this is no score of all rows
    assert [(one.dataset_name, one.metric_value) for one in card().data.eval_results] == [("squares", 50), ("more", 50)]
    assert card().text.count("<!-- scores") == 1 and card().text.count("| exact_match |") == 2
    assert card().data.license == "mit" and "## Citation" in card().text


def test_other_cards_are_left_alone(root, run):
    results = Results.load(sorted(root.rglob("results_*.json"))[-1])
    other = root / "other"
    other.mkdir()
    assert add_scores(other, results) is None
    (other / "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n")
    assert add_scores(other, results) is None and (other / "README.md").read_text().endswith("# Mine\n")
    (other / "README.md").write_text("---\n- no mapping\n---\n")
    with pytest.raises(InputError, match="front matter"):
        add_scores(other, results)


def test_scores_on_texts_are_the_hubs_model_index(tmp_path):
    """The card of a language student: every number has what the hub's own reader of model-index asks for."""
    from tests.evaluation.test_measures import text

    results = text("student", 1)
    results.data["configs"]["leads"]["dataset"] = {"path": "/here/leads.jsonl"}
    card = "---\npipeline_tag: text-generation\ntags: [vlm-taid]\nmodel_name: student\n---\n# Student\n"
    (tmp_path / "README.md").write_text(card)
    assert add_scores(tmp_path, results) == tmp_path / "README.md"
    written = ModelCard.load(tmp_path / "README.md")
    name, found = model_index_to_eval_results(eval_results_to_model_index("student", written.data.eval_results))
    assert name == "student" and [one.metric_type for one in found] == ["byte_perplexity", "kl", "top1_agreement"]
    numbers = results.data["results"]["leads"]
    values = [one.metric_value for one in found]
    scales = {"byte_perplexity": 1, "kl": 1, "top1_agreement": 100}
    assert values == [round(scale * numbers[f"{metric},none"], 3) for metric, scale in scales.items()]
    assert {one.task_type for one in found} == {"text-generation"} and found[1].metric_args["teacher"] == "big"
    assert "/here" not in (tmp_path / "README.md").read_text()
    assert f"| leads | kl |  | {values[1]:.3f} ± " in written.text
    results.data["config"]["limit"] = 3
    assert add_scores(tmp_path, results) is None


@pytest.fixture(scope="module")
def model(run):
    return AutoModelForImageTextToText.from_pretrained(run)


@pytest.mark.parametrize("name", METHODS)
def test_every_objective_has_a_card(recipe, model, name):
    read = Recipe.load(recipe)
    read.objective = ObjectiveOptions(name=name)
    read.data.train[0].path = "owner/data"
    card = ModelCard(model_card(read, TrainerState(), model))
    assert card.data.datasets == ["owner/data"] and name in card.data.tags
    assert ("- teacher:" in card.text) == (name != "sft")
    assert ("```bibtex" in card.text) == (name == "taid")
    assert ("arxiv.org/abs" in card.text) == (METHODS[name][1] is not None)


def test_live_curves_are_tensorboards_unless_the_recipe_says_otherwise(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = run.rglob("events.out.tfevents*")
    curves = EventAccumulator(str(events)).Reload()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    for key in ("t", "kl", "answer_tokens_per_second", "peak_memory_gib"):
        assert [one.value for one in curves.Scalars(f"train/{key}")] == pytest.approx([row[key] for row in logged])
