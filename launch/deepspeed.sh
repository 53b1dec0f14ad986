#!/usr/bin/env bash
# Train a recipe on this machine with the deepspeed launcher: one rank for each GPU, or two ranks without GPUs.
# RANKS sets another number.
#
#   launch/deepspeed.sh configs/quickstart-segformer.yaml run.steps=20
#   RANKS=4 launch/deepspeed.sh configs/my-recipe.yaml --resume auto
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
cores=$(nproc)
# The launcher does not set a number of threads. Without one, every rank starts as many threads as there are cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / ranks > 0 ? cores / ranks : 1))}
# Take a free port, so that several jobs can run at once.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

devices=()
if ((gpus > 0)); then
    # Give --num_gpus only if RANKS is set: with it the launcher ignores CUDA_VISIBLE_DEVICES.
    [[ -z ${RANKS:-} ]] || devices=(--num_gpus "$ranks")
else
    devices=(--num_accelerators "$ranks")
    export DS_ACCELERATOR=cpu
fi
exec python "$(dirname "$0")/stoppable.py" deepspeed "${devices[@]}" --no_local_rank --master_port "$port" --module maskmatch_scale train "$@"
