#!/bin/bash
# Trains on any number of nodes and goes on by itself after the time limit or a preemption:
#
#     sbatch --nodes 2 tools/slurm.sh --config-file configs/fgd_frcnn.yaml OUTPUT_DIR output/frcnn
#
# What follows the script's name are train_net.py's own options. OUTPUT_DIR must be on a disk that
# all nodes share. Five minutes before the time limit Slurm sends SIGTERM: the run finishes its
# step, saves and exits with code 75, and this script puts the job back into the queue. Any other
# code ends it. scancel ends it too, because it also signals this script.
#
#SBATCH --job-name=fgd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

STOPPED=75 # train_net.py's exit code when all is saved

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export DIST_URL="tcp://$head:$((20000 + SLURM_JOB_ID % 20000))"

# One task per node, which starts a process per GPU. Each task has its own SLURM_NODEID, so the
# line is expanded there. --resume starts anew where nothing has been saved yet.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c '
    exec train_net.py --resume --num-gpus "${SLURM_GPUS_ON_NODE:-1}" \
        --num-machines "$SLURM_NNODES" --machine-rank "$SLURM_NODEID" --dist-url "$DIST_URL" "$@"
' train "$@"
status=$?

if [ "$status" -eq "$STOPPED" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
