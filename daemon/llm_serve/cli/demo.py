"""`demo`: the embedded model on the CPU, served with no configuration."""

from __future__ import annotations

import os
import time

from llm_serve.cli.run import Start, report, serve
from llm_serve.core.errors import LlmServeError
from llm_serve.core.instance_file import parse_instance
from llm_serve.host.demo_model import default_cache, ensure_demo_model
from llm_serve.host.systemd import Silence

_FILE = """\
model = {model}

[server]
listen = {listen}
anthropic_messages = true

[engine]
served_model_name = ["smollm2-135m-instruct"]
dtype = "float32"
max_model_len = 2048
max_num_seqs = 16
enforce_eager = true
kv_cache_memory_bytes = 536870912
"""
_CURL = """
Ready after {seconds:.0f} s. Try it from another terminal:

  curl http://{listen}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "smollm2-135m-instruct", "temperature": 0,
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

http://{listen}/ shows in a browser how it is. Ctrl-C ends it.
"""


def demo(listen: str) -> int:
    """Fetch and convert the model when it is not there yet, then serve it until Ctrl-C."""
    began = time.monotonic()

    def on_ready() -> None:
        print(_CURL.format(seconds=time.monotonic() - began, listen=listen), flush=True)

    try:
        model = ensure_demo_model(default_cache(os.environ), say)
        text = _FILE.format(model=_quoted(str(model)), listen=_quoted(listen))
        settings = parse_instance(text, source="the built-in demo file", name="demo")
    except LlmServeError as error:
        return report(error, Silence())
    return serve(Start(settings, text, (), Silence(), on_ready))


def say(line: str) -> None:
    """One line of progress, on a terminal as off it."""
    print(line, flush=True)


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
