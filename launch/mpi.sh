#!/usr/bin/env bash
# A run in the processes of Open MPI: launch/mpi.sh 2 --flagfile=configs/gpu.cfg --workdir=DIR
#
# The first argument is the number of processes; the others are flags of dpreg.main. mpirun finds the hosts in a
# Slurm or PBS allocation, or in the file HOSTFILE. JAX gets the number of each process from Open MPI. The folder
# DIR must be the same on all hosts. Process 0 listens on a port that JAX derives from the number of the job;
# the port is not protected, so keep the hosts in a private network.
#
# Exit code 75 means that the run was preempted and has saved a checkpoint: this script starts it again, unless
# the script itself was stopped. After any other failure, start the same command again, with the same --workdir:
# the run resumes from the newest checkpoint.
#
# Run in the project's tests: on one host with Open MPI 4.1. Not run: on several hosts, or with PBS.
set -u
processes=$1
shift
stopped=
folder=runs/mpi-$(date +%Y%m%d-%H%M%S) # a fixed default for --workdir, so that a restart finds the checkpoints
resume=() # overrides the flags after a restart
# mpirun kills its processes at SIGTERM, but forwards SIGUSR1 to them: they save a checkpoint and exit with 75.
trap 'stopped=1; kill -USR1 "$mpirun" 2>/dev/null' TERM INT
while :; do
  # shellcheck disable=SC2086  # MPIRUN_FLAGS are several words
  mpirun ${HOSTFILE:+--hostfile "$HOSTFILE"} ${MPIRUN_FLAGS:-} -n "$processes" \
    "${PYTHON:-python}" -m dpreg.main --workdir="$folder" "$@" "${resume[@]}" &
  mpirun=$!
  wait "$mpirun"
  code=$?
  while kill -0 "$mpirun" 2>/dev/null; do # a signal has interrupted the wait
    wait "$mpirun"
    code=$?
  done
  if [ "$code" -ne 75 ] || [ -n "$stopped" ]; then
    exit "$code"
  fi
  resume=(--resume=auto)
done
