#!/usr/bin/env bash
# usage: [VARIABLE=value …] launch/deepspeed.sh [--dry-run] RECIPE [key=value …] [--resume auto|PATH]
#
# Train with the deepspeed launcher, on this machine or on the hosts of a hostfile (by pdsh and ssh).
#
#   HOSTFILE         a file of lines `HOST slots=RANKS`; not set: this machine alone
#   RANKS            ranks of each host: its GPUs (two ranks without GPUs); with HOSTFILE: its slots
#   MASTER_ADDR      with HOSTFILE: address of its first host; what `hostname -I` says there first
#   MASTER_PORT      port of rank 0: a free one; with HOSTFILE one drawn from 20000-29999
#   OMP_NUM_THREADS  cores of this machine / ranks of a host
#   DS_ENV_FILE      with HOSTFILE: lines NAME=value that ranks get too (.deepspeed_env here, or at home);
#                    NCCL_*, PYTHON*, UCX_* of this environment they get anyway
#   DS_ACCELERATOR   cpu where this machine has no GPU
#   PDSH_SSH_ARGS_APPEND  with HOSTFILE: -o ServerAliveInterval=15 -o ServerAliveCountMax=4, so that ssh ends when a host
#                    is cut off
#
#   launch/deepspeed.sh configs/quickstart-segformer.yaml run.steps=20
#   HOSTFILE=hosts.txt launch/deepspeed.sh configs/mine.yaml --resume auto
source "$(dirname "$0")/common.sh" || exit 2

HOSTFILE=${HOSTFILE:-} RANKS=${RANKS:-} MASTER_ADDR=${MASTER_ADDR:-}
gpus=$(count_gpus)
((gpus > 0)) || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
words=("$@") where=() front=()

if [[ -n $HOSTFILE ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file; write a line \`HOST slots=RANKS\` for each host"
    # The same lines that deepspeed takes: it would end with a traceback.
    wrong=$(awk '/^[ \t]*(#|$)/ { next }
        !/^[ \t]*[^ \t]+[ \t]+slots=[1-9][0-9]*[ \t\r]*$/ { print "line " NR ": \"" $0 "\" is not `HOST slots=RANKS`"; exit }
        seen[$1]++ { print "line " NR ": " $1 " is there already; name each host once"; exit }
        END { if (!length(seen)) print "no host; write a line `HOST slots=RANKS` for each" }' "$HOSTFILE")
    [[ -z $wrong ]] || fail "HOSTFILE=$HOSTFILE: ${wrong%%$'\n'*}"
    command -v pdsh >/dev/null || fail "HOSTFILE=$HOSTFILE: deepspeed needs pdsh to reach its hosts; install it"
    # deepspeed ends when all ssh have ended; of a host that is cut off, ssh would wait for ever.
    export PDSH_SSH_ARGS_APPEND=${PDSH_SSH_ARGS_APPEND--o ServerAliveInterval=15 -o ServerAliveCountMax=4}
    MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
    slots=$(awk 'split($2, part, "=") == 2 && part[1] == "slots" && part[2] > most { most = part[2] } END { print most }' "$HOSTFILE")
    # --force_multi: with a single host deepspeed would start the ranks here.
    where=(--hostfile "$HOSTFILE" --force_multi ${RANKS:+--num_gpus "$RANKS"} ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
    front=(--hosts "$(awk '!/^[ \t]*(#|$)/ { printf "%s%s", comma, $1; comma = "," }' "$HOSTFILE")")
    share_cores "${RANKS:-$slots}"
    # A shell on each host reads the command once more. deepspeed puts words with spaces in double quotes.
    for number in "${!words[@]}"; do
        word=${words[number]}
        if [[ $word == *' '* ]]; then
            word=${word//\\/\\\\} word=${word//\$/\\\$} word=${word//\`/\\\`}
        else
            printf -v word %q "$word"
        fi
        words[number]=$word
    done
else
    MASTER_PORT=${MASTER_PORT:-$(free_port)} # so that several jobs can run at once
    if ((gpus == 0)); then
        where=(--num_accelerators "${RANKS:-2}")
    elif [[ -n $RANKS ]]; then # without it the launcher heeds CUDA_VISIBLE_DEVICES
        where=(--num_gpus "$RANKS")
    fi
    share_cores "${RANKS:-$((gpus > 0 ? gpus : 2))}"
fi
whole_number MASTER_PORT
start "HOSTFILE RANKS MASTER_ADDR MASTER_PORT OMP_NUM_THREADS DS_ENV_FILE DS_ACCELERATOR PDSH_SSH_ARGS_APPEND" \
    python "$launch/stoppable.py" "${front[@]}" deepspeed "${where[@]}" --no_local_rank --master_port "$MASTER_PORT" \
    --module maskmatch_scale train "${words[@]}"
