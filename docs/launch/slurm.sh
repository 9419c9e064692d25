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
srun --no-kill --kill-on-bad-exit=0 actstore extract "$@" || code=$?
case $code in
    3 | 75) scontrol requeue "$SLURM_JOB_ID" ;; # the storage failed, or it was stopped: the same command continues
esac
exit "$code"
