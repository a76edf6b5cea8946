#!/usr/bin/env bash
# One run over the processes of Open MPI: launch/mpi.sh 2 --flagfile=configs/gpu.cfg --workdir=DIR
#
# The first argument says how many processes; the others are flags of dpreg.main. Hosts come as mpirun takes
# them: from a Slurm or PBS allocation, or HOSTFILE. JAX learns from Open MPI who each process is. The folder
# DIR has to be the same on all hosts. Process 0 serves at a port that JAX derives from the job's number;
# nothing protects it, so keep the hosts in a private network.
#
# Exit code 75 means preempted and saved: start the same command again.
#
# Run in the project's tests: on one host with Open MPI 4.1. Not run: several hosts, PBS.
set -eu
processes=$1
shift
# shellcheck disable=SC2086  # MPIRUN_FLAGS are several words
exec mpirun ${HOSTFILE:+--hostfile "$HOSTFILE"} ${MPIRUN_FLAGS:-} -n "$processes" "${PYTHON:-python}" -m dpreg.main "$@"
