#!/usr/bin/env bash
set -euo pipefail
# 8x RTX 5090, no NVLink; GPUs 0-3 hang on NUMA node 0.
MODEL_DIR=/data/models/Qwen3.6-27B
LOG_DIR=${LOG_DIR:-/var/log/vllm}
API_KEY="sk-5090-local-only-not-for-others"

export CUDA_DEVICE_ORDER=PCI_BUS_ID
export CUDA_VISIBLE_DEVICES=0,1,2,3
export NCCL_P2P_DISABLE=1
export OMP_NUM_THREADS=8
export VLLM_WORKER_MULTIPROC_METHOD=spawn
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export PATH=/opt/vllm/bin:$PATH

ARGS=(
  --served-model-name qwen3.6-27b
  --tensor-parallel-size 4
  --host 0.0.0.0
  --port 8000
  --api-key "$API_KEY"
  --max-model-len 32768
  --max-num-seqs 64          # found by reading logs: this is the limit, not the KV cache
  --max-num-batched-tokens 8192
  --gpu-memory-utilization 0.90
  --enable-prefix-caching
  --reasoning-parser qwen3
  --default-chat-template-kwargs '{"enable_thinking": false}'
)

mkdir -p "$LOG_DIR"
nohup numactl --cpunodebind=0 --membind=0 \
  vllm serve "$MODEL_DIR" "${ARGS[@]}" \
  >"$LOG_DIR/vllm-$(date +%F).log" 2>&1 &
echo "started, pid $!"
