#!/usr/bin/env bash
# Sets up what is missing and trains.
#
#   ./run_train.sh                                              the default job: a small Llama on Python's own source
#   CONFIG_FILE=my.toml NGPU=8 ./run_train.sh --training.steps=100
#   COMM_MODE=fake_backend NGPU=64 CONFIG_FILE=… ./run_train.sh   a dry run, without a GPU
#
# CONFIG_FILE  the job                                     NGPU      processes on this machine (default: the accelerators, else 1)
# COMM_MODE    default | fake_backend | local_tensor       LOG_RANK  ranks that report, as a comma list (default 0)
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT              several machines, as torchrun has them
# MAX_RESTARTS how often ranks that failed are started again, from the last checkpoint (default 0; NGPU > 1)
# ESPALIER_STARTED when the job began, in seconds since 1970 (default: now); training.exit_after counts from there
#
# Exit codes: 0 done, 1 failed, 2 your input, 75 stopped by SIGTERM, SIGINT or training.exit_after with a checkpoint written
# (the same command goes on), 128 + n ended by signal n. SIGUSR1 saves a checkpoint. See docs/interruption.md.
set -euo pipefail

export ESPALIER_STARTED=${ESPALIER_STARTED:-$(date +%s)}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$("$root/scripts/setup.sh")
export CONFIG_FILE=${CONFIG_FILE:-$root/models/llama3/train_configs/debug_model.toml}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m trainer.launch "$@"
