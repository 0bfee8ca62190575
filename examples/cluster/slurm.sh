#!/usr/bin/env bash
# Under Slurm, one torchrun per machine:
#
#     sbatch slurm.sh CONFIG
#
# Five minutes before its time is over, the job is asked to end: strop finishes the step and saves. The same command goes
# on from there, and so does a job that Slurm puts into the queue again after a machine has failed.
#SBATCH --job-name=strop
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=strop-%j.log
set -euo pipefail

config=${1:?the configuration file}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --ntasks-per-node=1 --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="$first:29500" \
    --max-restarts=3 \
    -m strop train --config "$config" --resume
