"""Environment variables that would open the engine to its clients, or put foreign code into it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

SET_BY_US = frozenset({"VLLM_RPC_BASE_PATH", "TMPDIR", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_CONFIG_PATH"})
OPENS_ENGINE = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "it lets files and tensors run code as they are unpacked",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "it lets pickled code into the engine",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "it lets every client load files into the engine",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "it lets one client's request take another's name",
    "VLLM_SERVER_DEV_MODE": "it opens routes that reset and reload the engine to every client",
}
LOADS_CODE = {
    "LD_AUDIT": "it loads foreign code into the engine",
    "LD_PRELOAD": "it loads foreign code into the engine",
    "PYTHONHOME": "it loads foreign code into the engine",
    "PYTHONPATH": "it loads foreign code into the engine",
    "PYTHONSTARTUP": "it loads foreign code into the engine",
}
"""In the environment of the daemon itself these have had their effect; there it is whoever starts it who decides."""
UNSAFE = OPENS_ENGINE | LOADS_CODE
_FALSE = frozenset({"", "0", "false", "no", "off"})


def is_off(value: object) -> bool:
    """True for a switch that is written down as shut."""
    return str(value).strip().lower() in _FALSE


def opening(environ: Mapping[str, str], allowed: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, why) of what the daemon was started with that opens its engine, and that the file does not allow."""
    for name, why in OPENS_ENGINE.items():
        if name in environ and name not in allowed and not is_off(environ[name]):
            yield name, why
