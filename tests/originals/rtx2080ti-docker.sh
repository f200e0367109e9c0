docker run -d --name qwen3-32b --restart always \
  --gpus all --ipc=host --shm-size 16g \
  -p 8000:8000 \
  -v /data/models:/models:ro \
  -e VLLM_USE_V1=0 -e NCCL_DEBUG=WARN \
  vllm/vllm-openai:v0.8.4 \
  --model /models/Qwen3-32B-AWQ --served-model-name qwen3-32b \
  --quantization awq --dtype float16 \
  --tensor-parallel-size 4 --max-model-len 32768 --max-num-seqs 16 \
  --gpu-memory-utilization 0.90 --swap-space 16 --enable-prefix-caching --enable-chunked-prefill False \
  --enable-reasoning --reasoning-parser deepseek_r1 --max-seq-len-to-capture 32768 --trust-remote-code
