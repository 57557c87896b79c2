#!/usr/bin/env bash
# A SLURM job that saves before its time limit and is requeued until the run is complete.
#   sbatch docs/slurm.sh configs/dit_xl_2.yaml runs/xl data.shards=latents
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

config=$1 run_dir=$2
shift 2
torchrun --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" train.py --config "$config" run_dir="$run_dir" "$@" --resume &
launcher=$!
requeue=0
# torchrun does not forward USR1. It forwards TERM to every worker; they save and exit.
trap 'requeue=1; kill -TERM "$launcher"' USR1
wait "$launcher"
status=$?
if [ "$requeue" = 1 ]; then
    wait "$launcher"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
