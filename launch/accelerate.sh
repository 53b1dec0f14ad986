#!/usr/bin/env bash
# usage: [VARIABLE=value …] launch/accelerate.sh [--dry-run] RECIPE [key=value …] [--resume auto|PATH]
#
# Train with accelerate as the engine. On several machines: start it on each of them, with the same values but NODE_RANK.
#
#   NNODES           machines: 1
#   RANKS            ranks of each machine: the GPUs of this one, or one process without GPUs
#   NODE_RANK        which of the machines this is, from 0: SLURM_NODEID or JOB_COMPLETION_INDEX, else 0
#   MASTER_ADDR      the first machine; needed for several
#   MASTER_PORT      a port of it that is free: 29500; on a single machine any
#   OMP_NUM_THREADS  cores of this machine / RANKS
#
#   RANKS=2 launch/accelerate.sh configs/mine.yaml --resume auto
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=gpu1 launch/accelerate.sh configs/mine.yaml --resume auto
source "$(dirname "$0")/common.sh" || exit 2

NNODES=${NNODES:-1} RANKS=${RANKS:-}
whole_number NNODES
which_machine
if [[ -z $RANKS ]]; then
    gpus=$(count_gpus)
    RANKS=$((gpus > 0 ? gpus : 1))
fi
share_cores "$RANKS"

# These come after the recipe, which may name DeepSpeed, and before the caller's own settings.
arguments=(train "$1" engine.library=accelerate engine.zero_stage=0 "${@:2}")
shown='NNODES RANKS NODE_RANK MASTER_ADDR MASTER_PORT OMP_NUM_THREADS'
if ((NNODES * RANKS == 1)); then
    # One rank needs no launcher, and without one the exit code is the run's own.
    start "$shown" python -m maskmatch_scale "${arguments[@]}"
fi
if ((NNODES == 1)); then
    MASTER_PORT=${MASTER_PORT:-0} # a free one, so that several jobs can run at once
else
    MASTER_PORT=${MASTER_PORT:-29500}
    whole_number MASTER_PORT
fi
# --multi_gpu is right on a CPU too: `accelerate launch --cpu` starts several ranks only with MPI. Options that are not
# given here would come from accelerate's configuration file.
start "$shown" python "$launch/stoppable.py" accelerate launch --multi_gpu --num_processes "$((NNODES * RANKS))" \
    --num_machines "$NNODES" --machine_rank "$NODE_RANK" ${MASTER_ADDR:+--main_process_ip "$MASTER_ADDR"} \
    --main_process_port "$MASTER_PORT" --mixed_precision no --dynamo_backend no --module maskmatch_scale "${arguments[@]}"
