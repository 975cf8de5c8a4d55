"""The page after a run: curves, scores and sample answers in one HTML file that needs nothing else."""

from vlm_taid.report.command import MAX_BYTES, report
from vlm_taid.report.runs import MAX_POINTS, Run

__all__ = ["MAX_BYTES", "MAX_POINTS", "Run", "report"]
