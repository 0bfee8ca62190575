#!/usr/bin/env bash
# Several machines by hand. Run the same command on each of them, at about the same time:
#
#     bash two_machines.sh FIRST_MACHINE CONFIG [MACHINES] [GPUS_PER_MACHINE]
#
# FIRST_MACHINE is a name or address of one of them, which all can reach. Model, rows and configuration are at the same
# paths everywhere. If a process dies, torchrun starts all of them again, and they go on from the newest checkpoint.
set -euo pipefail

first=${1:?the name of the first machine}
config=${2:?the configuration file}
machines=${3:-2}
gpus=${4:-8}

exec torchrun \
    --nnodes="$machines" \
    --nproc_per_node="$gpus" \
    --rdzv_backend=c10d \
    --rdzv_id=strop \
    --rdzv_endpoint="$first:29500" \
    --max-restarts=3 \
    -m strop train --config "$config" --resume
