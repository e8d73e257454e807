#!/usr/bin/env bash
#SBATCH --job-name=gristmill
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
# sbatch configs/slurm/curate.sh configs/commoncrawl.toml run.directory=/shared/runs/commoncrawl
# From the repository, with the environment that holds gristmill active; the run directory where every node sees it, inputs too.
# Submitted again after a crash or the time limit, it goes on. Nodes whole and its own (--exclusive): at the end Ray stops every
# Ray of this user on them.
set -euo pipefail

address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):${RAY_PORT:-6379}
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # Ray waits 30 s for the other nodes; many need longer to import it
ray get-auth-token --generate >/dev/null           # into the home that all nodes share

# symmetric-run exits 0 even when Ray could not be started: this file tells that the run was begun and ended well
ended=$PWD/slurm-$SLURM_JOB_ID.ended
# RAY_ADDRESS for the command alone: without it gristmill would start a Ray of its own, on that node only
# shellcheck disable=SC2016
srun --cpus-per-task "$SLURM_CPUS_ON_NODE" ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus "$SLURM_CPUS_ON_NODE" --object-store-memory 2000000000 -- \
  env RAY_ADDRESS="$address" bash -c 'gristmill run "$@" && touch "$0"' "$ended" "$@"
rm "$ended"
