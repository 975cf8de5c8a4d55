"""The model card of a run: what was distilled from what, on which data, how, under which licences."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from transformers.trainer_pt_utils import get_model_param_count

from .evaluation.card import NOT_YET, TAG, hub_id
from .recipe import Recipe

# Each objective's name, and the paper that it comes from where there is one.
METHODS = {
    "taid": ("TAID (Temporally Adaptive Interpolated Distillation)", "2501.16937"),
    "fkl": ("forward KL distillation", None),
    "rkl": ("reverse KL distillation", None),
    "js": ("generalised Jensen-Shannon distillation", "2306.13649"),
    "tvd": ("total variation distillation", None),
    "sfkl": ("skew forward KL distillation", "2402.03898"),
    "srkl": ("skew reverse KL distillation", "2402.03898"),
    "akl": ("adaptive KL distillation", "2404.02657"),
    "dkd": ("decoupled distillation", "2203.08679"),
    "ctkd": ("forward KL distillation at a learned temperature", "2211.16231"),
    "sft": ("supervised fine-tuning", None),
}
ROLLOUTS = {"gkd": "2306.13649", "distillm": "2402.03898"}
CITATION = """@inproceedings{shing2025taid,
  title     = {TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models},
  author    = {Shing, Makoto and Misaki, Kou and Bao, Han and Yokoi, Sho and Akiba, Takuya},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.16937}
}"""
VISION_SNIPPET = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder", device_map="auto")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
content = [{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is in the picture?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""
TEXT_SNIPPET = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is distillation?"}],
    add_generation_prompt=True, return_dict=True, return_tensors="pt",
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


@functools.cache
def _front(path: str, kind: str = "model") -> dict[str, Any]:
    """The front matter of another model's or data set's own card; empty where none can be had."""
    card_class = DatasetCard if kind == "dataset" else ModelCard
    file = Path(path) / "README.md"
    try:
        if file.is_file():
            return card_class.load(file, ignore_metadata_errors=True).data.to_dict()
        if hub_id(path):
            return card_class.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HFValidationError):  # offline, no such card, or broken: it is only asked for a licence
        pass
    return {}


def _licence(path: str, kind: str = "model") -> str:
    front = _front(path, kind)
    found = front.get("license_name") or front.get("license")
    return f", licence {found}" if found else ", licence not stated where it lies"


def _base_models(path: str) -> list[str]:
    """The hub's names of the model that training began with: its own, or what its folder's card is based on."""
    if hub_id(path):
        return [path]
    named = _front(path).get("base_model") or []
    return [one for one in ([named] if isinstance(named, str) else named) if hub_id(one)]


def model_card(recipe: Recipe, state: Any, model: Any) -> str:
    """The README.md of a saved student, with the hub's front matter.

    The licence is the base model's, read from its own card (in its folder, or on the hub where that can be reached);
    a card that states none gives none. Scores are filled in by ``vlm-taid eval run``.

    Args:
        recipe: the run's recipe.
        state: its TrainerState.
        model: the student, or its low-rank adapters.
    """
    (method, paper), student = METHODS[recipe.objective.name], recipe.student.path
    is_vlm = getattr(model.config, "vision_config", None) is not None
    teachers = recipe.all_teachers if recipe.objective.objective().uses_teacher else []
    rollout = None if recipe.rollout is None else ROLLOUTS[recipe.rollout.policy]
    papers = list(dict.fromkeys(one for one in (paper, rollout) if one))
    base, front = _base_models(student), _front(student)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text" if is_vlm else "text-generation",
        base_model=base[0] if len(base) == 1 else base or None,
        base_model_relation="finetune" if base else None,
        datasets=[one for one in dict.fromkeys(s.path for s in recipe.data.train) if hub_id(one)] or None,
        license=front.get("license"),
        license_name=front.get("license_name"),
        license_link=front.get("license_link"),
        tags=[TAG, "distillation", recipe.objective.name, *(f"arxiv:{one}" for one in papers)],
    )
    lines = [f"- student: `{student}`, {get_model_param_count(model) / 1e6:.1f} M parameters{_licence(student)}"]
    if recipe.student.prune is not None:
        lines.append(f"- pruned to {recipe.student.prune.layers} decoder layers, evenly spaced with the first and last")
    lines += [f"- teacher: `{one.path}`{_licence(one.path)}" for one in teachers]
    lines += [f"- data: `{one.path}` ({one.format}){_licence(one.path, 'dataset')}" for one in recipe.data.train]
    last = next((log for log in reversed(state.log_history) if "loss" in log), None)
    lines.append(f"- optimizer steps: {state.global_step} of {state.max_steps}")
    if last is not None:
        lines.append(f"- last training loss: {last['loss']:.4f} nats per answer token")
    versions = ", ".join(f"{one} {metadata.version(one)}" for one in ("transformers", "torch", "deepspeed"))
    settings = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    cited = f"```bibtex\n{CITATION}\n```" if recipe.objective.name == "taid" else ""
    others = "\n".join(f"- [arXiv {one}](https://arxiv.org/abs/{one})" for one in papers if one != METHODS["taid"][1])
    citation = "\n\n".join(part for part in (cited, others) if part)
    return f"""---
{data.to_yaml()}
---

# {Path(student).name}, by {method}

{chr(10).join(lines)}
- made with vlm_taid, {versions}

A distilled model inherits what its teacher and its base model get wrong, and the terms of both: check the licences of
the student, the teacher and the data before you share it.

## Use

```python
{VISION_SNIPPET if is_vlm else TEXT_SNIPPET}
```

## Scores

{NOT_YET}

## Recipe

```yaml
{settings.strip()}
```
{f"{chr(10)}## Citation{chr(10)}{chr(10)}{citation}{chr(10)}" if citation else ""}"""
