#!/usr/bin/env bash
# Train a recipe on this machine with accelerate as the engine: one rank for each GPU, or one process without GPUs.
# RANKS sets another number.
#
#   launch/accelerate.sh configs/quickstart-segformer.yaml run.steps=20
#   RANKS=2 launch/accelerate.sh configs/my-recipe.yaml --resume auto
set -euo pipefail
if (($# == 0)); then
    echo "usage: launch/accelerate.sh RECIPE [key=value …] [--resume auto|PATH]" >&2
    exit 2
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
# The launcher gives every rank one thread. Divide the cores among the ranks instead.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}

# These come after the recipe, which may name DeepSpeed, and before the caller's own settings.
arguments=(train "$1" engine.library=accelerate engine.zero_stage=0 "${@:2}")
if ((ranks == 1)); then
    # One rank needs no launcher, and without one the exit code is the run's own.
    exec python -m maskmatch_scale "${arguments[@]}"
fi
# --multi_gpu is right on a CPU too: `accelerate launch --cpu` starts several ranks only with MPI.
# Port 0 means a free port, so that several jobs can run at once. Options that are not given here would come from
# accelerate's configuration file.
exec python "$(dirname "$0")/stoppable.py" \
    accelerate launch --multi_gpu --num_processes "$ranks" --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no --module maskmatch_scale "${arguments[@]}"
