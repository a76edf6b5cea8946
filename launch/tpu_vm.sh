#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice: launch/tpu_vm.sh NAME ZONE --config_preset=tpu --workdir=DIR
#
# NAME and ZONE are those of the TPU VM; the other arguments are flags of dpreg.main. Every host runs the same
# command, and JAX gets the number of the process from the metadata of the TPU. It needs gcloud, and dpreg on the hosts:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pip install "dpreg[tpu]"'
# --num_shards must be at least the number of chips, and --batch_size a multiple of --num_shards.
#
# DIR must be on a file system that all hosts mount.
#
# The hosts find each other in the network of the slice; open no port to the outside.
# Exit code 75 means that the run was preempted and has saved a checkpoint: start the same command again.
#
# Not run: no TPU was available. It is checked by shellcheck.
set -eu
name=$1 zone=$2
shift 2
printf -v flags '%q ' "$@" # quote again, for the shell on the host
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="${PYTHON:-python3} -m dpreg.main --coordinator_address=auto $flags"
