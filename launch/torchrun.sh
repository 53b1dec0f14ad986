#!/usr/bin/env bash
# usage: [VARIABLE=value …] launch/torchrun.sh [--dry-run] RECIPE [key=value …] [--resume auto|PATH]
#
# Train with torchrun. On several machines: start it on each of them, with the same values but NODE_RANK.
#
#   NNODES           machines: 1. MIN:MAX is elastic: the run goes on with as many machines as there are, from the
#                    newest checkpoint (give --resume auto), when one comes or is lost
#   RANKS            ranks of this machine: its GPUs, or two ranks without GPUs
#   NODE_RANK        which of the machines this is, from 0: SLURM_NODEID or JOB_COMPLETION_INDEX, else 0; not for MIN:MAX
#   MASTER_ADDR      the first machine, whose torchrun must be there all the time; needed for several machines
#   MASTER_PORT      a port of it that is free: 29500; on a single machine any
#   JOB_ID           MIN:MAX: a name that only this job has there: maskmatch
#   MAX_RESTARTS     MIN:MAX: how often ranks are started again after an error or a lost machine: 3
#   LOCAL_ADDR       address of this machine for the others, where its host name is not one
#   OMP_NUM_THREADS  cores of this machine / RANKS
#
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=gpu1 launch/torchrun.sh configs/mine.yaml --resume auto
#   NNODES=1:4 MASTER_ADDR=gpu1 launch/torchrun.sh configs/mine.yaml --resume auto
source "$(dirname "$0")/common.sh" || exit 2

NNODES=${NNODES:-1} RANKS=${RANKS:-} MASTER_ADDR=${MASTER_ADDR:-} LOCAL_ADDR=${LOCAL_ADDR:-}
JOB_ID=${JOB_ID:-maskmatch} MAX_RESTARTS=${MAX_RESTARTS:-3}
[[ $NNODES =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "NNODES=$NNODES: neither a number of machines nor MIN:MAX"
if [[ -z $RANKS ]]; then
    gpus=$(count_gpus)
    RANKS=$((gpus > 0 ? gpus : 2))
fi
share_cores "$RANKS"
[[ $NNODES == 1 ]] && MASTER_PORT=${MASTER_PORT:-$(free_port)}
MASTER_PORT=${MASTER_PORT:-29500}
whole_number MASTER_PORT

case $NNODES in
    *:*)
        first_machine
        ((${NNODES%:*} <= ${NNODES#*:})) || fail "NNODES=$NNODES: MIN is above MAX"
        [[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: not a whole number"
        where=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$JOB_ID" --max-restarts "$MAX_RESTARTS")
        NODE_RANK=''
        ;;
    *)
        whole_number NNODES
        which_machine
        where=(--node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$MASTER_PORT")
        JOB_ID='' MAX_RESTARTS=''
        ;;
esac
start "NNODES RANKS NODE_RANK MASTER_ADDR MASTER_PORT JOB_ID MAX_RESTARTS LOCAL_ADDR OMP_NUM_THREADS" \
    python "$launch/stoppable.py" torchrun --nnodes "$NNODES" --nproc-per-node "$RANKS" "${where[@]}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} --module maskmatch_scale train "$@"
