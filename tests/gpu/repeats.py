"""Is an answer whose state is more than its tokens the same, token by token, when an engine is made to say it again?

    python -m tests.gpu.repeats --model FOLDER [--only SCENE ...] [--json FILE] [--logs FILE] [--caches FOLDER]

Asked again without more, told to repeat some tokens, of another engine, and cut by EngineCore's death. Each row is the
place of the first token that differs from the first answer; null where none does.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from llm_serve.engine import forced
from tests.daemon import MODEL_NAME, Daemon
from tests.gpu.stage import Row, Stage, engine_core, play, until_serving

_TOKENS = 200
_ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalties": {"presence_penalty": 0.8, "frequency_penalty": 0.4},
    "repetition penalty": {"repetition_penalty": 1.3, "presence_penalty": 0.1},
    "seed": {"temperature": 0.9, "seed": 7},
    "seed and penalties": {"temperature": 0.9, "seed": 7, "presence_penalty": 0.8, "frequency_penalty": 0.4},
}


def small(stage: Stage) -> Row:
    """Random weights in float32, where no two tokens are as good as equal."""
    return _repeats(stage.with_model(str(_small_model(stage))), load_format="auto", dtype="float32")


def whole(stage: Stage) -> Row:
    """The model as given, with made-up weights: they are nearly zero, and so are the differences between tokens."""
    return _repeats(stage)


def _repeats(stage: Stage, **engine: Any) -> Row:
    rows: dict[str, Row] = {name: {} for name in _ASKED}
    more = {"enforce_eager": True, "max_model_len": 2048, "gpu_memory_utilization": 0.5} | engine
    with stage.daemon(engine=more, limits={"allow": ["vllm_xargs"]}) as daemon:
        until_serving(daemon, 1, 300)
        first = {name: _tokens(daemon, asked) for name, asked in _ASKED.items()}
        for name, asked in _ASKED.items():
            rows[name]["again"] = _first_difference(first[name], _tokens(daemon, asked))
            for number in (1, 20, 80):
                told = asked | {"vllm_xargs": {forced.KEY: first[name][:number]}}
                rows[name][f"told {number}"] = _first_difference(first[name], _tokens(daemon, told))
        os.kill(engine_core(daemon), signal.SIGKILL)
        for name, asked in _ASKED.items():
            rows[name]["another engine"] = _first_difference(first[name], _tokens(daemon, asked))
        for name, asked in _ASKED.items():
            rows[name]["cut"], rows[name]["cut after"] = _cut(daemon, asked, first[name])
    return {"rows": rows}


def _body(asked: dict[str, Any]) -> dict[str, Any]:
    prompt = {
        "model": MODEL_NAME,
        "prompt": "Once upon a time, in a land of rivers and of many hills, there was a king",
    }
    return prompt | {"max_tokens": _TOKENS, "ignore_eos": True, "return_token_ids": True, "temperature": 0} | asked


def _tokens(daemon: Daemon, asked: dict[str, Any]) -> list[int]:
    answer = daemon.http.post("/v1/completions", json=_body(asked), timeout=300)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def _cut(daemon: Daemon, asked: dict[str, Any], first: list[int]) -> tuple[int | None, int]:
    """EngineCore killed in the middle: the place of the first difference, and how many tokens had been delivered."""
    epoch, tokens, cut_after = daemon.status()["epoch"], list[int](), 0
    with daemon.http.stream("POST", "/v1/completions", json=_body(asked) | {"stream": True}, timeout=300) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            tokens += event["choices"][0]["token_ids"] or ()
            if not cut_after and len(tokens) >= _TOKENS // 3:
                cut_after = len(tokens)
                os.kill(engine_core(daemon), signal.SIGKILL)
    until_serving(daemon, epoch + 1)
    return _first_difference(first, tokens), cut_after


def _first_difference(first: list[int], second: list[int]) -> int | None:
    if first == second:
        return None
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _small_model(stage: Stage) -> Path:
    """A folder with a model of some million weights and the given model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = stage.folder / "small"
    tokenizer = AutoTokenizer.from_pretrained(stage.model)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
                         initializer_range=0.08, tie_word_embeddings=False)  # fmt: skip
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SCENES = {scene.__name__: scene for scene in (small, whole)}


if __name__ == "__main__":
    play(SCENES, __doc__)
