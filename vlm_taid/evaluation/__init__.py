"""Evaluation: greedy answers to files of questions, scored, saved and compared."""

from vlm_taid.evaluation import metrics
from vlm_taid.evaluation.card import add_scores
from vlm_taid.evaluation.command import run_command, tasks_command
from vlm_taid.evaluation.comparison import (
    Comparison,
    agreement,
    agreements,
    blind_baseline,
    compare,
    discordant,
    paired_test,
)
from vlm_taid.evaluation.export import export_command
from vlm_taid.evaluation.gallery import save_grid
from vlm_taid.evaluation.language_command import evaluate_text, lm_command
from vlm_taid.evaluation.models import load
from vlm_taid.evaluation.results import Results, Score, read_samples
from vlm_taid.evaluation.runner import evaluate
from vlm_taid.evaluation.saved import score_command
from vlm_taid.evaluation.tables import compare_command
from vlm_taid.evaluation.tasks import Task

__all__ = [
    "Comparison",
    "Results",
    "Score",
    "Task",
    "add_scores",
    "agreement",
    "agreements",
    "blind_baseline",
    "compare",
    "compare_command",
    "discordant",
    "evaluate",
    "evaluate_text",
    "export_command",
    "lm_command",
    "load",
    "metrics",
    "paired_test",
    "read_samples",
    "run_command",
    "save_grid",
    "score_command",
    "tasks_command",
]
