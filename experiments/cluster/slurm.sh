#!/bin/bash
# One process per node, which drives all its GPUs:
#
#   sbatch experiments/cluster/slurm.sh --config=experiments/sft.py --workdir=/shared/runs/sft
#   sbatch --nodes=8 experiments/cluster/slurm.sh --config=...     # what is given here wins over the lines below
#
# The workdir must be on a file system that all nodes share. Every start goes on from its last checkpoint: after a
# failure inside of the allocation, and after the time limit in a new one.
#SBATCH --job-name=mindjax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

RESTARTS=${RESTARTS:-10}     # after failures, in one allocation

if [ $# -eq 0 ]; then
  echo "usage: sbatch $0 --config=FILE[:SIZE] --workdir=SHARED_FOLDER [...]" >&2
  exit 2
fi

# Seconds: until all nodes have arrived; until one that is silent counts as dead; until a step that hangs ends the job.
export MINDJAX_START_TIMEOUT=${MINDJAX_START_TIMEOUT:-600}
export MINDJAX_HEARTBEAT_TIMEOUT=${MINDJAX_HEARTBEAT_TIMEOUT:-100}
export MINDJAX_STEP_TIMEOUT=${MINDJAX_STEP_TIMEOUT:-1800}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch

# Before the time limit comes SIGTERM: all processes save, and the job goes back into the queue.
limit_near=
trap 'limit_near=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

for ((restart = 0; restart <= RESTARTS; restart++)); do
  status=0
  srun --kill-on-bad-exit=1 --label mindjax run "$@" &
  step=$!
  wait "$step" || status=$?
  if [ -n "$limit_near" ]; then # the trap has ended the first wait
    status=0
    wait "$step" || status=$?
  fi
  case $status in
    0) exit 0 ;;
    2) exit 2 ;; # a mistake in the command or the config, which a restart does not mend
  esac
  if [ -n "$limit_near" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  echo "ended with status $status; restart $((restart + 1)) of $RESTARTS" >&2
done
exit "$status"
