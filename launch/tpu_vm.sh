#!/usr/bin/env bash
# One run over all hosts of a Cloud TPU slice: launch/tpu_vm.sh NAME ZONE --config_preset=tpu --workdir=DIR
#
# NAME and ZONE are those of the TPU VM; the other arguments are flags of dpreg.main. Every host runs the same
# command, and JAX learns from the TPU's metadata who each is. Needs gcloud, and dpreg installed on the hosts:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pip install "dpreg[tpu]"'
# --num_shards has to be at least the number of chips, and --batch_size a multiple of it.
#
# DIR has to lie on a file system that all hosts mount.
#
# The hosts find each other in the slice's own network; open no port to the outside.
# Exit code 75 means preempted and saved: start the same command again.
#
# Not run: no TPU was at hand. Checked: shellcheck.
set -eu
name=$1 zone=$2
shift 2
printf -v flags '%q ' "$@" # quoted once more, as a shell on the host reads them
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="${PYTHON:-python3} -m dpreg.main --coordinator_address=auto $flags"
