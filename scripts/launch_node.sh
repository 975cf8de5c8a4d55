#!/bin/bash
# Starts this node's part of a run on several nodes, without ssh between them: run it on every node at the same time.
#
#   NODES=2 NODE=0 MASTER=10.0.0.1 bash scripts/launch_node.sh --config configs/vlm_2b.yaml
#
# NODES    nodes in all                    NODE    this node's number, from 0
# MASTER   a name or address of node 0     PORT    a free port of node 0 (29500)
# GPUS     processes on this node (its GPUs)
#
# SIGTERM goes to all of this node's processes: they save a checkpoint and end. The launcher's own exit status is then 1;
# complete.json in the run's folder tells a finished run. The same command goes on where it stopped.
set -u
: "${NODES:?the number of nodes}" "${NODE:?the number of this node, from 0}" "${MASTER:?a name or address of node 0}"
GPUS=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
if [ "${GPUS:-0}" -lt 1 ]; then
    echo "launch_node.sh: no GPU was found on this node; set GPUS" >&2
    exit 2
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds to save before they are killed
torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "$GPUS" \
    --master_addr "$MASTER" --master_port "${PORT:-29500}" -m vlm_taid distill "$@" &
launcher=$!
trap 'kill -TERM $launcher 2>/dev/null' TERM INT
wait $launcher
status=$?
while kill -0 $launcher 2>/dev/null; do  # a signal ends the first wait, not the launcher
    wait $launcher
    status=$?
done
exit $status
