#!/usr/bin/env bash
#SBATCH --job-name=actstore
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
# One worker on each GPU:
#   sbatch slurm.sh STORE --model MODEL --documents DOCUMENTS ...
# Two minutes before its time is over, or when it is preempted, every worker gets SIGTERM, commits what it has and ends
# with 75; the job then queues again, and goes on where it was. --no-kill and --kill-on-bad-exit=0: the others go on
# when a node or a worker dies.
set -uo pipefail
code=0
# srun ends with the largest code of its workers. Since SLURM 22.05 it does not take --cpus-per-task from sbatch.
srun --no-kill --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" actstore extract "$@" || code=$?
case $code in
    75 | 137 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # stopped, or one was killed: the same command continues
    3) # the storage failed: so it does, but not for ever
        [ "${SLURM_RESTART_COUNT:-0}" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
