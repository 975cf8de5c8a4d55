#!/usr/bin/env bash
# The main job, small: distils a vision-language model with TAID on easy-VQA and compares it with plain fine-tuning.
# Everything is written below runs/quickstart; what is there already is used again.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
install_into_venv
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS="ignore::FutureWarning"

run=runs/quickstart
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

# Two ranks: on GPUs where there are two, on one GPU alone, else on CPU cores.
gpus=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
options=()
if [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')}"
    ranks=2
    if ! python -c 'import sys, torch; sys.exit(not torch.cpu._is_avx512_bf16_supported())'; then
        options+=(--training.bf16 false --teacher.dtype float32) # without bf16 instructions fp32 is faster
    fi
else
    ranks=$gpus
fi
options+=(--training.per_device_train_batch_size $((128 / ranks)))

say "1/5 easy-VQA: 38,575 training questions, 9,673 held-out ones"
python data/easy_vqa.py --output "$run/data"

say "2/5 A student of 1.77 M parameters, pruned from the teacher of 5.69 M (data/quickstart)"
[ -f "$run/models/student-init/model.safetensors" ] ||
    python data/quickstart_models.py student --teacher data/quickstart/teacher --output "$run/models/student-init"

train() { # NAME OBJECTIVE
    if [ -f "$run/$1/complete.json" ]; then
        echo "$run/$1 is complete and used again"
        return
    fi
    deepspeed --num_gpus "$ranks" --module vlm_taid distill --config configs/quickstart.yaml \
        --objective.name "$2" --training.output_dir "$run/$1" "${options[@]}"
}
say "3/5 The student distilled with TAID, by the deepspeed launcher on $ranks ranks (ZeRO-2)"
train taid taid
say "4/5 The same student without a teacher, for as many steps"
train sft sft

say "5/5 Teacher and students on all held-out questions"
python scripts/quickstart_results.py --run "$run"
