#!/bin/bash
# Scores with one GPU per task of an array; see docs/cluster.md. Tasks may run at any time and in any order, and be
# repeated; the one that makes the last part finishes the dataset.
#   sbatch pipelines/slurm.sh /data/shards /data/scored
#SBATCH --job-name=aligncurate
#SBATCH --array=1-16
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue

srun aligncurate score "$1" --out "$2" --partition "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --workers "$SLURM_CPUS_PER_TASK"
