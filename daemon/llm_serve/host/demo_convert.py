"""Turns the demo model's GGUF file into a plain model folder; run as a script, in a process of its own.

    python -I demo_convert.py FILE.gguf FOLDER

The only module outside `engine` that imports torch, and only inside `main`: the process that runs it
ends, and torch's gigabyte ends with it. Progress goes to stdout, one line a step; vLLM 0.32 cannot load
GGUF on a CPU, which is why the weights are written out as bfloat16 safetensors at all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STEPS = 4


def main(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and chat template to `folder`."""
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

    _step(1, "loading torch and transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}

    _step(2, "reading the tokenizer and the chat template")
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template:
        sys.exit("the GGUF file has no chat template")

    _step(3, "unpacking the weights to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )

    _step(4, "writing the model folder")
    # The file does not say it, and transformers' own default is 10^30.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _step(number: int, words: str) -> None:
    print(f"[{number}/{_STEPS}] {words}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
