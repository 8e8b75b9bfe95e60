#!/usr/bin/env bash
# sbatch docker/slurm.sh model=pythia-1b corpus.path=/data/pile/ queries.path=queries.jsonl output=/data/runs/pile-1b
# One Ray over the nodes of the allocation, one scan on it. Requeued after a time limit or a lost node, it goes on.
#SBATCH --job-name=infscan
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?run this with sbatch}"
# Where `make` installed infscan, on a disk that every node sees.
PATH="$PWD/.venv/bin:$PATH"

# One token for this allocation; without one, everybody who reaches the nodes could run code on them.
umask 077
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 10000))
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
ray_start=(ray start --block --disable-usage-stats "${resources[@]}")

# Other jobs may share the node: sockets and logs of this one lie in a folder of its own.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" \
    "${ray_start[@]}" --head --include-dashboard=false --node-ip-address="$head_address" --port="$port" \
    --temp-dir="$(mktemp --directory --tmpdir ray-XXXXXX)" &
export RAY_ADDRESS="$head_address:$port"
for _ in $(seq 60); do
    ray health-check --address "$RAY_ADDRESS" && break
    sleep 2
done

if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head_node" \
        "${ray_start[@]}" --address="$RAY_ADDRESS" &
fi

# The driver is this script's child: the signal before the time limit ends it cleanly, and the requeued job goes on.
python jobs/scan.py cluster=gpu cluster.num_workers=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1})) "$@" &
driver=$!
trap 'kill -TERM "$driver"; wait "$driver" || true; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$driver"
