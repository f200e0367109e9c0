#!/bin/bash
# Qwen2.5-7B on one RTX 3090, vLLM 0.14. Backends tried by hand, one after another:
#   FLASH_ATTN (hangs), FLASHINFER (no nvcc), FLEX_ATTENTION (slow), XFORMERS (gone), TRITON_ATTN (works)
source ~/venvs/vllm/bin/activate
export CUDA_VISIBLE_DEVICES=0
export VLLM_ATTENTION_BACKEND=TRITON_ATTN
export VLLM_USE_V1=1
export HF_ENDPOINT=https://hf-mirror.com

pkill -f "vllm serve" || true
sleep 5

nohup vllm serve Qwen/Qwen2.5-7B-Instruct \
  --host 0.0.0.0 --port 8000 \
  --dtype half \
  --max-model-len 8192 \
  --gpu-memory-utilization 0.9 \
  --swap-space 4 \
  --disable-log-requests \
  > vllm.log 2>&1 &
echo $! > vllm.pid

until curl -s http://127.0.0.1:8000/health; do sleep 2; done
