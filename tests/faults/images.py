"""A model that sees, small enough to be made on the spot: its words mean nothing, but they depend on the picture."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}


def make_model(tokenizer_of: Path, folder: Path) -> Path:
    """Write a BLIP-2 of 10 million random weights; of the models that see, it needs no torchvision."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = _TEMPLATE
    eyes = {"hidden_size": 32, "intermediate_size": 64, **_LAYERS}
    config: Any = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(image_size=56, patch_size=14, **eyes),
        qformer_config=transformers.Blip2QFormerConfig(vocab_size=len(tokenizer), encoder_hidden_size=32, **eyes),
        text_config=transformers.OPTConfig(
            vocab_size=len(tokenizer), hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, **_LAYERS
        ),
        num_query_tokens=8,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.6)
    model.save_pretrained(folder)
    size = {"height": 56, "width": 56}
    transformers.Blip2Processor(transformers.BlipImageProcessorPil(size=size), tokenizer).save_pretrained(folder)
    return folder


def picture(colour: str) -> str:
    """A picture of one colour, as a URL."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
