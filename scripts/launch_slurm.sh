#!/bin/bash
# A run on several nodes under Slurm, that goes on by itself after its time is over.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch_slurm.sh --config configs/llm_1_5b.yaml
#
# Five minutes before the job's time is over Slurm signals this script: all ranks save a checkpoint and end, and the job
# is put into the queue again. training.resume: auto (the default) then goes on from there. scancel ends it for good, and
# leaves the ranks Slurm's KillWait (30 s) to save.
#SBATCH --job-name=vlm-taid
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER NODES=$SLURM_JOB_NUM_NODES
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-}}
stopped=no
srun --kill-on-bad-exit=1 bash -c 'NODE=$SLURM_NODEID exec bash scripts/launch_node.sh "$@"' launch "$@" &
job=$!
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1 # the step's processes alone: srun stays and waits
trap 'kill -TERM $job 2>/dev/null' TERM
wait $job
status=$?
while kill -0 $job 2>/dev/null; do
    wait $job
    status=$?
done
if [ "$stopped" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $status
