"""Answers on disk while a run goes on, so that a killed run continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_taid.evaluation.readers import json_line, text_sha256


class Journal:
    """The lines of one run, a file for each task and rank, until the results take their place.

    A file's first line is the hash of all that decides the answers; files of another run are not read. A last line
    that was cut short is left out: its row is answered again.

    Args:
        folder: where the files lie; made if it is missing.
        decides: what decides the answers: model, data, prompts, generation.
    """

    def __init__(self, folder: Path, decides: Mapping[str, Any]):
        self.folder, self._mark = folder, text_sha256(json_line(decides))

    def _files(self, task: str) -> list[Path]:
        return sorted(self.folder.glob(f"unfinished_{task}_rank*.jsonl"))

    def read(self, task: str) -> list[dict[str, Any]]:
        """The task's answers of the same run, whichever rank wrote them, each row once; errors are tried again."""
        found: dict[int, dict[str, Any]] = {}
        for path in self._files(task):
            mark, *lines = path.read_text(encoding="utf-8").split("\n")
            if mark == self._mark:
                for line in lines[:-1]:  # what follows the last line break is empty, or cut short
                    sample = json.loads(line)
                    if "error" in sample:
                        continue
                    found[sample["doc_id"]] = sample
        return list(found.values())

    def start(self, task: str, rank: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begins the task's file of this rank with the lines that are known already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"unfinished_{task}_rank{rank}.jsonl"
        text = "".join(json_line(line) + "\n" for line in lines)
        path.with_suffix(".new").write_text(f"{self._mark}\n{text}", encoding="utf-8")
        path.with_suffix(".new").replace(path)
        self._file = path.open("a", encoding="utf-8")

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines and hands them to the system, so that a killed process loses none."""
        self._file.write("".join(json_line(line) + "\n" for line in lines))
        self._file.flush()

    def close(self) -> None:
        """Ends the file that `start` began."""
        self._file.close()

    def remove(self, tasks: Sequence[str]) -> None:
        """Removes the files of these tasks, of all ranks."""
        for task in tasks:
            for path in self._files(task):
                path.unlink()
