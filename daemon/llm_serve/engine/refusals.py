"""What vLLM says when it refuses arguments, said again in the words and the places of the instance file.

It knows vLLM's messages and no vLLM: the texts were collected by provoking them on 0.32.0. A message that
is not in the table still comes through, on one line and with the option it names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from llm_serve.core.errors import ConfigError, HostError, Problem
from llm_serve.core.toml_lines import locate, locate_within


class Report:
    """Collects problems of one file, and catches vLLM's refusals as problems."""

    def __init__(self, source: str, text: str | None, options: Collection[str]) -> None:
        self._source, self._text, self._options = source, text, options
        self._problems: list[Problem] = []

    def add(self, path: str, message: str, hint: str | None = None) -> None:
        """Note a problem of the option at `path`."""
        line = locate_within(self._text, path) if self._text is not None else None
        self._problems.append(Problem(self._source, line, path, message, hint))

    def raise_if_any(self) -> None:
        """Raise ConfigError with all that was noted, in the order of the file."""
        if self._problems:
            raise ConfigError(sorted(self._problems, key=lambda problem: problem.line or 0))

    def _is_written(self, path: str) -> bool:
        return self._text is not None and locate(self._text, ".".join(path.split(".")[:2])) is not None

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Context in which whatever vLLM raises becomes ConfigError or HostError."""
        try:
            yield
        except (ConfigError, HostError):
            raise
        # Nothing narrower would do: vLLM refuses with ValueError, OSError, KeyError, TypeError,
        # RuntimeError and pydantic's ValidationError, and its own bugs here are as lasting as a wrong value.
        except Exception as error:
            trouble = _host_trouble(_with_causes(error))
            if trouble is not None:
                raise HostError(trouble) from error
            for path, message, hint in _refusals(error, self._options):
                self.add(path, message, hint)
            # vLLM also complains about values that it derived from a wrong one; only what is written counts.
            written = [problem for problem in self._problems if self._is_written(problem.path)]
            raise ConfigError(written or self._problems) from error


def _with_causes(error: BaseException) -> str:
    """What was said, and by whom, down to the first cause: vLLM calls a hub that is down an invalid model name."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(said) < _MOST_CAUSES:
        said.append(f"{type(cause).__name__}: {cause}" if said else str(cause))
        cause = cause.__cause__ or cause.__context__
    return " caused by ".join(said)


def _host_trouble(message: str) -> str | None:
    """Return what the machine lacks, when that is what the message says."""
    for pattern, words in _HOST_TROUBLE:
        if re.search(pattern, message, re.IGNORECASE):
            return f"{words}: {plain(message)}"
    return None


_MOST_CAUSES = 8
_HOST_TROUBLE = (
    (r"failed to infer device type", "vLLM finds no device it can use"),
    (r"no cuda gpus are available|cuda unknown error|error 802", "the GPU driver is not ready"),
    (
        r"connecterror|connecttimeout|couldn't connect to|connection error|timed out|max retries exceeded",
        "the model hub is out of reach",
    ),
)

_ADVICE: tuple[tuple[str, str, str], ...] = (
    # (what vLLM says, the option it is about, what to do)
    (
        r"max_model_len \(.*derived max_model_len \(max_position_embeddings=(?P<n>\d+)",
        "engine.max_model_len",
        "Set it to {n} or less, or extend the model's context by hf_overrides",
    ),
    (r"not a valid JSON file", "model", "Download config.json again"),
    (r"does not recognize this architecture", "model", "A newer transformers, or another model, is needed"),
    (r"are not supported for now", "model", "See vLLM's list of supported models"),
    (r"failed to be inspected", "model", "The cause is in vLLM's log; often a cache folder is not writable"),
    (
        r"gated repo|401 client|403 client|unauthorized",
        "model",
        "Accept its terms and set HF_TOKEN in [engine.env]",
    ),
    (
        r"repo id must|not a valid model identifier|invalid repository id",
        "model",
        "Give a hub id or a folder",
    ),
    (
        r"backend tokenizer|can't load tokenizer",
        "model",
        "Add the tokenizer's files, or set engine.tokenizer",
    ),
    (
        r"attention heads \(\d+\) must be divisible",
        "engine.tensor_parallel_size",
        "Choose a divisor of the heads",
    ),
    (
        r"world size \(\d+\) is larger than the number of available gpus",
        "engine.tensor_parallel_size",
        "Lower the parallel sizes, or name more GPUs in gpu.devices",
    ),
    (r"pipeline parallelism is not supported", "engine.pipeline_parallel_size", "Use tensor_parallel_size instead"),
    (
        r"max_num_batched_tokens .*max_num_seqs",
        "engine.max_num_batched_tokens",
        "Raise it, or lower max_num_seqs",
    ),
    (r"unknown attention backend", "engine.attention_backend", "Leave it out to let vLLM choose"),
    (r"reasoning parser .* not found", "engine.reasoning_parser", "Choose one of those named"),
    (r"unknown quantization|config file for", "engine.quantization", "Leave it out: the model's own is used"),
    (
        r"failed to import ray",
        "engine.distributed_executor_backend",
        f"Install it on every host, in the version of the cluster; here: {sys.prefix}/bin/pip install ray",
    ),
    (r"load format .* is not", "engine.load_format", "Leave it out to let vLLM choose"),
    (r"chat template string", "engine.chat_template", "Give a file that exists, or the template itself"),
)


def _refusals(error: Exception, options: Collection[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield (path, message, hint) for each thing that one exception of vLLM's says."""
    items: Callable[..., list[dict[str, Any]]] | None = getattr(error, "errors", None)
    if items is None:
        # str() of a KeyError is its message in quotes, and often the message is one word.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        kind = type(error).__name__
        yield _one_refusal(message if " " in message else f"{kind}: {message}", "", options)
        return
    table = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(getattr(error, "title", ""))).lower()
    prefix = f"{table}." if table in options else ""
    for item in items(include_url=False, include_input=True):
        option = prefix + ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if option and not isinstance(item.get("input"), dict):
            message = f"{message}, not {shown(item.get('input'))}"
        yield _one_refusal(message, option, options)


def _one_refusal(message: str, option: str, options: Collection[str]) -> tuple[str, str, str | None]:
    for pattern, path, hint in _ADVICE:
        match = re.search(pattern, message, re.IGNORECASE)
        if match:
            return path, _shortened(plain(message)), hint.format(**match.groupdict())
    return _path_of(option, message, options), plain(message), None


def _shortened(message: str) -> str:
    """The first sentence says what is wrong; what follows is advice for a command line."""
    return re.split(r"\. To allow overriding|\. If this is intentional| Tried: ", message, maxsplit=1)[0]


def _path_of(option: str, message: str, options: Collection[str]) -> str:
    """Return the option that a message is about: the one it names, else `engine` as a whole."""
    if option.partition(".")[0] in options:
        return f"engine.{option}"
    named = [word for word in re.findall(r"[a-z]\w+", plain(message)) if "_" in word and word in options]
    if named:
        return f"engine.{named[0]}"
    return f"engine ({option})" if option else "engine"


def plain(message: str) -> str:
    """Return a message of vLLM's on one line: without pydantic's trimmings, with the file's names."""
    lines = [line.strip() for line in message.splitlines() if "errors.pydantic.dev" not in line]
    if lines and re.match(r"\d+ validation errors? for", lines[0]):
        lines = lines[1:]
    words = " ".join(filter(None, lines))
    words = re.sub(r"\s*\[type=\w+, input_value=.*?(?:input_type=\w+\])", "", words)
    words = re.sub(r"^(?:Error: )?(?:Value error, )?", "", words)
    words = re.sub(r"(?<!\w)--([a-z][\w-]+)", lambda flag: flag.group(1).replace("-", "_"), words)
    return words if len(words) <= 300 else f"{words[:300].rpartition(' ')[0].rstrip(',')} ..."


def shown(value: object) -> str:
    """Return a value as JSON, short enough for a line of a log."""
    words = json.dumps(value, default=str)
    return words if len(words) <= 60 else f"{words[:57]}..."
