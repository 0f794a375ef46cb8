#!/usr/bin/env bash
# A command of tisdpo on all GPUs of a Slurm job:
#
#   sbatch --nodes 2 examples/launch/slurm.sh run --config FILE
#
# Outputs, checkpoints and the cache belong on a file system that all nodes share. The job is told to stop 5 minutes
# before its time is up, and saves a checkpoint; the same sbatch line resumes.
#SBATCH --job-name=tisdpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$processes} / processes))
# Seconds until torchrun kills what it has told to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

exec srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d --rdzv_endpoint "$first:${PORT:-29500}" -m tisdpo_cli "$@"
