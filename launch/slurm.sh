#!/usr/bin/env bash
# usage: sbatch --nodes=N [--gpus-per-node=G] [other options of sbatch] launch/slurm.sh RECIPE [key=value …]
#        launch/slurm.sh --dry-run RECIPE …      prints the command, also outside slurm
#
# Train as a slurm job. Submit it in the folder of this repository, with the environment activated. It adds --resume auto.
# Five minutes before the time limit, and when it is pre-empted or requeued, the run writes a checkpoint; the same job
# is then queued again and goes on.
#
#   LAUNCHER         srun: slurm starts the ranks, no ssh, no other launcher. torchrun, accelerate: one launcher on each
#                    node, started by srun, no ssh. deepspeed: one on the first node, which reaches the others by ssh
#   RANKS            ranks of each node: its GPUs (SLURM_GPUS_ON_NODE), or one rank without
#   MASTER_ADDR      address of the first node: its name
#   MASTER_PORT      20000 + number of the job modulo 10000; srun: derived by the run from job and step
#   LAUNCH_FOLDER    where this script and those beside it are: launch, in the folder of sbatch
#   OMP_NUM_THREADS  cores of the node / RANKS
#SBATCH --job-name=maskmatch --output=maskmatch-%j.txt --open-mode=append
#SBATCH --requeue --signal=USR1@300 --exclusive

# slurm runs a copy of this file, in another folder.
LAUNCH_FOLDER=${LAUNCH_FOLDER:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/launch}
[[ -f $LAUNCH_FOLDER/common.sh ]] || {
    echo "launch/slurm.sh: $LAUNCH_FOLDER/common.sh is not there: call sbatch in the repository, or set LAUNCH_FOLDER" >&2
    exit 2
}
script=$LAUNCH_FOLDER/slurm.sh
source "$LAUNCH_FOLDER/common.sh"

[[ -n ${SLURM_JOB_ID:-} || -n $dry_run ]] || fail "this is not a slurm job: sbatch --nodes=2 launch/slurm.sh $1"
LAUNCHER=${LAUNCHER:-srun} RANKS=${RANKS:-${SLURM_GPUS_ON_NODE:-1}} NNODES=${SLURM_NNODES:-1} cpus=${SLURM_CPUS_ON_NODE:-$(nproc)}
export LAUNCHER RANKS NNODES OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus / RANKS > 0 ? cpus / RANKS : 1))}

unset HOSTFILE # of the shell that called sbatch; the one of the job is removed at its end

arguments=("$@" --resume auto)
# A rank that has ended does not end the others: they may still write their part of the checkpoint.
step=(srun --kill-on-bad-exit=0 --nodes "$NNODES")
each=(--ntasks-per-node 1 --cpus-per-task "$cpus")
if [[ $LAUNCHER != srun ]]; then
    first=$([[ -z $dry_run ]] && scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1 || echo FIRST_NODE)
    export MASTER_ADDR=${MASTER_ADDR:-$first} MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
    whole_number MASTER_PORT
fi
case $LAUNCHER in
    srun)
        command=("${step[@]}" --ntasks-per-node "$RANKS" --cpus-per-task "$((cpus / RANKS > 0 ? cpus / RANKS : 1))"
            python -m maskmatch_scale train "${arguments[@]}")
        ;;
    torchrun | accelerate) command=("${step[@]}" "${each[@]}" "$launch/$LAUNCHER.sh" "${arguments[@]}") ;;
    deepspeed)
        export HOSTFILE=$PWD/maskmatch-${SLURM_JOB_ID:-JOB}.hosts
        [[ -n $dry_run ]] || scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$RANKS/" >"$HOSTFILE"
        # In a step, not in this script: signals before the time limit go to steps.
        command=(srun --nodes 1 --ntasks 1 "${each[@]:2}" "$launch/deepspeed.sh" "${arguments[@]}")
        ;;
    *) fail "LAUNCHER=$LAUNCHER: srun, torchrun, accelerate or deepspeed" ;;
esac

if [[ -n $dry_run ]]; then
    start "LAUNCHER RANKS NNODES MASTER_ADDR MASTER_PORT HOSTFILE OMP_NUM_THREADS" "${command[@]}"
fi
trap : TERM # of a requeued job the script gets it too; it waits for the step, which slurm gives KillWait seconds
code=0
# In a subshell, because `start` becomes the command.
(start "LAUNCHER RANKS NNODES MASTER_ADDR MASTER_PORT HOSTFILE OMP_NUM_THREADS" "${command[@]}") || code=$?
[[ -z ${HOSTFILE:-} ]] || rm -f "$HOSTFILE"
if ((code == 75 && SECONDS < 60 && ${SLURM_RESTART_COUNT:-0} >= 3)); then
    # It would be queued again for ever: with a time limit below five minutes, for example, slurm stops it at its start.
    echo "launch/slurm.sh: the run was stopped $SECONDS s after it was started again for the ${SLURM_RESTART_COUNT}th time;" \
        "job $SLURM_JOB_ID is not queued again: look at its time limit (SIGUSR1 comes 300 s before) and run.max_hours" >&2
elif ((code == 75)); then
    echo "launch/slurm.sh: the run has stopped with a checkpoint; job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID" || true # slurm itself may have done it
fi
exit "$code"
