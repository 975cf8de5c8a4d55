"""The model card of a run: what was distilled from what, on which data, how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_pt_utils import get_model_param_count

from .recipe import Recipe

NAMES = {
    "taid": "TAID (Temporally Adaptive Interpolated Distillation)",
    "fkl": "forward KL distillation",
    "rkl": "reverse KL distillation",
    "js": "generalised Jensen-Shannon distillation",
    "tvd": "total variation distillation",
    "sfkl": "skew forward KL distillation",
    "srkl": "skew reverse KL distillation",
    "akl": "adaptive KL distillation",
    "dkd": "decoupled distillation",
    "ctkd": "forward KL distillation at a learned temperature",
    "sft": "supervised fine-tuning",
}
CITATION = """@inproceedings{shing2025taid,
  title     = {TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models},
  author    = {Shing, Makoto and Misaki, Kou and Bao, Han and Yokoi, Sho and Akiba, Takuya},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2501.16937}
}"""


def model_card(recipe: Recipe, state: Any, model: Any) -> str:
    """The README.md of a run's folder, with the hub's front matter.

    Args:
        recipe: the run's recipe.
        state: its TrainerState.
        model: the trained student.
    """
    method = NAMES[recipe.objective.name]
    is_vlm = getattr(model.config, "vision_config", None) is not None
    front = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if is_vlm else "text-generation",
        "base_model": recipe.student.path,
        "tags": ["vlm-taid", "distillation", recipe.objective.name],
    }
    named = [] if recipe.objective.name == "sft" else recipe.all_teachers
    teacher = "".join(f"- teacher: `{one.path}`\n" for one in named)
    data = "".join(f"- data: `{source.path}` ({source.format})\n" for source in recipe.data.train)
    last = next((log for log in reversed(state.log_history) if "loss" in log), {})
    auto = "AutoModelForImageTextToText" if is_vlm else "AutoModelForCausalLM"
    settings = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {Path(recipe.student.path).name}, by {method}

- student: `{recipe.student.path}`, {get_model_param_count(model) / 1e6:.1f} M parameters
{teacher}{data}- optimizer steps: {state.global_step}
- last training loss: {last.get("loss", float("nan")):.4f} nats per answer token

```python
from transformers import {auto}, {"AutoProcessor" if is_vlm else "AutoTokenizer"}

model = {auto}.from_pretrained("path/to/this/folder")
processor = {"AutoProcessor" if is_vlm else "AutoTokenizer"}.from_pretrained("path/to/this/folder")
```

## Recipe

```yaml
{settings.strip()}
```

## Citation

```bibtex
{CITATION}
```
"""
