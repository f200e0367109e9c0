"""Writes an instance file: TOML with its comments."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from llm_serve.core.importing import Draft
from llm_serve.core.launch import Remark
from llm_serve.core.plan import HIDDEN

_WIDTH = 118
_ABOUT = {
    "api_keys": "one key a line",
    "async_scheduling": "the next step is prepared while this one runs",
    "cpu_offload_gb": "GiB of weights for each GPU that stay in main memory",
    "default_chat_template_kwargs": "what the chat template gets, unless a request says otherwise",
    "devices": "as nvidia-smi numbers them",
    "dtype": "of weights and activations",
    "enable_prefix_caching": "equal beginnings of prompts are computed once",
    "enforce_eager": "true: no compilation, no CUDA graphs",
    "gpu_memory_utilization": "of each GPU's memory, for weights, activations and KV cache",
    "kv_cache_dtype": "of the KV cache",
    "max_model_len": "tokens of prompt and answer together",
    "max_num_batched_tokens": "tokens that one step may compute",
    "max_num_seqs": "requests that run at once; more wait",
    "served_model_name": "the names that clients call it by",
    "tensor_parallel_size": "GPUs that share each layer",
    "trust_remote_code": "true: code that comes with the model is run",
}


def instance_text(draft: Draft, origin: str) -> str:
    """Return the file: tables in the order of the manual, each with its remarks below."""
    head = (
        f"# {origin} as an instance of llm-serve, made by `llm-serve import`. What could not be carried over stands in",
        "# comments, with the reason. Before the first start: llm-serve check FILE",
    )
    blocks = [list(head)]
    if remarks := list(_remarks(draft, "")):
        blocks.append(remarks)
    blocks.append([f"model = {_value(draft.model)}"])
    plain = {name: value for name, value in draft.engine.items() if not _is_table(value)}
    for title, table in (("server", draft.server), ("engine", plain)):
        blocks.append([f"[{title}]", *_pairs(table), *_remarks(draft, title)])
    for name, table in draft.engine.items():
        if _is_table(table):
            about = f"  # {_ABOUT[name]}" if name in _ABOUT else ""
            blocks.append([f"[engine.{_key(name)}]{about}", *_pairs(table, with_comments=False)])
    for title, table in (("engine.env", draft.env), ("gpu", draft.gpu)):
        lines = [*_pairs(table, with_comments=False), *_remarks(draft, title)]
        blocks += [[f"[{title}]", *lines]] if lines else []
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _pairs(table: Mapping[str, Any], *, with_comments: bool = True) -> Iterator[str]:
    lines = [(f"{_key(name)} = {_value(value)}", _ABOUT.get(name, "")) for name, value in table.items()]
    width = min(max((len(line) for line, about in lines if about), default=0), 60)
    for line, about in lines:
        yield f"{line:<{width}}  # {about}" if about and with_comments else line


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: str) -> str:
    # JSON's escapes are TOML's too, but for DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(str(key))} = {_value(each)}" for key, each in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)


def _remarks(draft: Draft, table: str) -> Iterator[str]:
    for remark in draft.remarks:
        if remark.table == table:
            yield from _comment(remark, draft.name)


def _comment(remark: Remark, name: str) -> Iterator[str]:
    sentence = f"{_without_secrets(remark.what)}: {remark.why.replace('{name}', name)}"
    sentence = _on_one_line(sentence)
    yield from textwrap.wrap(
        sentence, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_long_words=False, break_on_hyphens=False
    )
    yield from (f"#     {_on_one_line(line)}" for line in remark.lines)


def _on_one_line(text: str) -> str:
    # A comment ends with its line, and no control character may stand in one.
    return " ".join(re.sub(r"[\x00-\x1f\x7f]+", " ", text).split())


_SECRET = re.compile(
    r"([\w.-]*(?:TOKEN|SECRET|PASSW\w*|API[-_]?KEY|ACCESS[-_]KEY|CREDENTIAL)(?:[-_]\w*)?)(=|:\s*|\s+)(?!\(hidden\))\S+",
    re.IGNORECASE,
)


def _without_secrets(text: str) -> str:
    text = _SECRET.sub(rf"\1\2{HIDDEN}", text)
    return re.sub(r"://[^/\s@]+@", f"://{HIDDEN}@", text)
