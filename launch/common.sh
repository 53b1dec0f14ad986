# Sourced by the scripts beside it, with their arguments in place: usage, --dry-run, what is wrong, and starting.
# shellcheck shell=bash
set -euo pipefail
# shellcheck disable=SC2034  # for the scripts
launch=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

fail() { # one line, exit code 2
    echo "launch/${script##*/}: $*" >&2
    exit 2
}

usage() { # the comment at the head of the script
    sed -n '2,/^\([^#]\|$\)/{s/^#\( \|$\)//p}' "$script" >&2
    exit 2
}

whole_number() { # NAME: the variable of this name is a whole number above 0
    [[ ${!1} =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=${!1}: not a whole number above 0"
}

count_gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# Launchers give each rank one thread, or as many as there are cores. Share the cores out among the ranks instead.
share_cores() { # RANKS of this machine
    local cores
    cores=$(nproc)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / $1 > 0 ? cores / $1 : 1))}
}

which_machine() { # of NNODES, and where the first one is
    NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-0}}}
    MASTER_ADDR=${MASTER_ADDR:-}
    ((NNODES > 1)) || NODE_RANK=0
    [[ $NODE_RANK =~ ^[0-9]{1,6}$ ]] || fail "NODE_RANK=$NODE_RANK: not a whole number"
    ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK: the last of NNODES=$NNODES machines is $((NNODES - 1))"
    first_machine
}

first_machine() {
    [[ $NNODES == 1 || -n $MASTER_ADDR ]] || fail "NNODES=$NNODES, but MASTER_ADDR is not set: the address of the first machine"
}

# Every start says the values of its variables on stderr. --dry-run prints the command and starts nothing.
start() { # "NAME …" COMMAND …
    local name values=()
    for name in $1; do
        [[ -z ${!name:-} ]] || values+=("$name=${!name}")
    done
    shift
    echo "launch/${script##*/}: ${values[*]}" >&2
    if [[ -n $dry_run ]]; then
        printf '%s\n' "${*@Q}"
        exit 0
    fi
    exec "$@"
}

script=${script:-$0} dry_run=''
(($# > 0)) || usage
if [[ $1 == --dry-run ]]; then
    dry_run=yes
    shift
    (($# > 0)) || usage
fi
[[ -f $1 ]] || fail "$1: no such recipe; the first argument is a recipe's file, key=value comes after it"
[[ -z ${OMP_NUM_THREADS:-} ]] || whole_number OMP_NUM_THREADS
[[ -z ${RANKS:-} ]] || whole_number RANKS
