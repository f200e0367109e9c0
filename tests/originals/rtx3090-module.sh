MODEL=${MODEL:-/data/models/Qwen2.5-7B-Instruct}
PORT=${PORT:-8000}
python -m vllm.entrypoints.openai.api_server --model "$MODEL" --served-model-name qwen2.5-7b \
    --host 127.0.0.1 --port $PORT --attention-backend TRITON_ATTN --max-model-len 16384 --max-num-seqs 64 --enforce-eager
