#!/usr/bin/env bash
# One run over the processes of Open MPI: launch/mpi.sh 2 --flagfile=configs/gpu.cfg --workdir=DIR
#
# The first argument says how many processes; the others are flags of dpreg.main. Hosts come as mpirun takes
# them: from a Slurm or PBS allocation, or HOSTFILE. JAX learns from Open MPI who each process is. The folder
# DIR has to be the same on all hosts. Process 0 serves at a port that JAX derives from the job's number;
# nothing protects it, so keep the hosts in a private network.
#
# Exit code 75 means preempted and saved: the run is started again, unless this script was told to stop. After
# any other failure start the same command again, with the --workdir that it had: it goes on from the newest
# checkpoint.
#
# Run in the project's tests: on one host with Open MPI 4.1. Not run: several hosts, PBS.
set -u
processes=$1
shift
stopped=
folder=runs/mpi-$(date +%Y%m%d-%H%M%S) # where the flags name none: it has to be found again
again=() # from the second time on, whatever the flags say
# mpirun ends its processes at SIGTERM, and passes SIGUSR1 on to them: they save and exit with 75.
trap 'stopped=1; kill -USR1 "$mpirun" 2>/dev/null' TERM INT
while :; do
  # shellcheck disable=SC2086  # MPIRUN_FLAGS are several words
  mpirun ${HOSTFILE:+--hostfile "$HOSTFILE"} ${MPIRUN_FLAGS:-} -n "$processes" \
    "${PYTHON:-python}" -m dpreg.main --workdir="$folder" "$@" "${again[@]}" &
  mpirun=$!
  wait "$mpirun"
  code=$?
  while kill -0 "$mpirun" 2>/dev/null; do # a signal ended the wait, not mpirun
    wait "$mpirun"
    code=$?
  done
  if [ "$code" -ne 75 ] || [ -n "$stopped" ]; then
    exit "$code"
  fi
  again=(--resume=auto)
done
