"""Imports run one way: cli -> recipe -> trainer -> {teachers, students, objectives} -> streams -> data."""

import ast
from pathlib import Path

import vlm_taid

ROOT = Path(vlm_taid.__file__).parent
# What each room may import, beside itself, errors and (from pretrained upwards) pretrained.
ALLOWED = {
    "errors": set(),
    "data": set(),
    "pretrained": set(),
    "checkpoints": set(),
    "parsing": set(),
    "ranks": set(),
    "streams": {"data"},
    "objectives": set(),
    "teachers": {"data", "objectives", "pretrained", "streams"},
    "trainable": {"pretrained"},
    "pruning": set(),
    "students": {"pretrained", "pruning", "trainable"},
    "evaluation": {"data", "objectives", "parsing", "pretrained", "ranks", "streams"},
    "resumable": {"checkpoints"},
    "rollout": {"data", "streams"},
    "lengths": {"data", "streams"},
    "streamed_batches": {"data", "streams"},
    "training_log": {"objectives"},
    "forward": {"objectives", "streams", "teachers", "trainable"},
    "trainer": {
        "data",
        "forward",
        "lengths",
        "objectives",
        "pretrained",
        "resumable",
        "rollout",
        "streamed_batches",
        "streams",
        "teachers",
        "trainable",
        "training_log",
    },
    "evaluation_callback": {"data", "evaluation", "rollout", "trainable", "trainer"},
    "recipe": {"data", "evaluation_callback", "objectives", "parsing", "rollout", "students", "teachers", "trainer"},
    "pairing": {"pretrained", "recipe", "streams", "teachers"},
    "caching": {"data", "objectives", "pairing", "recipe", "streams", "teachers"},
    "model_card": {"evaluation", "recipe"},
    "footprint": {"data", "pretrained", "pruning", "streams", "students", "trainable"},
    "planning": {"footprint", "objectives", "recipe", "teachers"},
    "distillation": {
        "evaluation_callback",
        "caching",
        "pairing",
        "checkpoints",
        "data",
        "lengths",
        "model_card",
        "pretrained",
        "recipe",
        "rollout",
        "streamed_batches",
        "streams",
        "students",
        "teachers",
        "trainable",
        "trainer",
        "objectives",
    },
    "report": {"data", "evaluation", "objectives", "streams", "teachers"},
    "inspection": {"data", "objectives", "pairing", "recipe", "streams", "students", "teachers"},
    "assembly": {"pretrained", "students"},
    "cli": {
        "assembly",
        "caching",
        "distillation",
        "evaluation",
        "footprint",
        "inspection",
        "parsing",
        "planning",
        "ranks",
        "recipe",
        "report",
    },
    "__main__": {"cli"},
    "__init__": {"distillation", "evaluation", "recipe"},
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names]
        found |= {name[1] for name in names if name[0] == "vlm_taid" and len(name) > 1}
    return {name for name in found if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}


def test_imports_run_one_way():
    for path in ROOT.rglob("*.py"):
        wrong = imported_rooms(path) - ALLOWED[room(path)] - {room(path), "errors"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_check_sees_imports():
    assert "trainer" in imported_rooms(ROOT / "recipe.py")
    assert "data" in imported_rooms(ROOT / "streams" / "encoder.py")


def test_no_file_is_too_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
