#!/bin/bash
# Starts a run on several nodes from one of them, by DeepSpeed's launcher and ssh without passwords (pdsh is needed).
#
#   HOSTFILE=hosts bash scripts/launch_hostfile.sh --config configs/llm_1_5b.yaml
#
# The host file has a line a node, as "node1 slots=8". The project and its environment lie at the same path on all nodes.
# What every node's processes need of the environment stands in ~/.deepspeed_env or ./.deepspeed_env, a NAME=value a line.
# OPTIONS are passed to the launcher, as OPTIONS="--launcher slurm" or "--include node1@node2".
set -u
: "${HOSTFILE:?a file with a line a node, as: node1 slots=8}"
if [ ! -r "$HOSTFILE" ]; then
    echo "launch_hostfile.sh: $HOSTFILE cannot be read; it has a line a node, as: node1 slots=8" >&2
    exit 2
fi
# shellcheck disable=SC2086
exec deepspeed --hostfile "$HOSTFILE" --master_port "${PORT:-29500}" ${OPTIONS:-} --module vlm_taid distill "$@"
