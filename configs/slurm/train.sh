#!/usr/bin/env bash
#SBATCH --job-name=gristmill-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:TERM@600
#SBATCH --time=24:00:00
# sbatch configs/slurm/train.sh CONFIG FOLDER [SECTION.KEY=VALUE]...
# FOLDER becomes the config's directory; it and the data where every node sees them. torchrun alone, no Ray: a node that fails ends
# the job, Slurm queues it again (--requeue), and it goes on from the last checkpoint. Ten minutes before the time limit it saves.
set -euo pipefail

config=$1 folder=$2
shift 2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# not a signal to the ranks: torchrun would kill them 30 s after it, in the midst of saving
trap 'touch "$folder/stop"; wait "$!"; exit' TERM
srun --cpus-per-task "$SLURM_CPUS_ON_NODE" --kill-on-bad-exit torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node gpu \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" --no-python \
  gristmill train "$config" directory="$folder" "$@" &
wait "$!"
