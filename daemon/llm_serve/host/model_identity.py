"""Names a model by its files, so that what was learned for one is not used for another.

Only names and sizes are looked at, and the text of small configuration files: no weight is read, nothing is asked over
a network, and a folder may move or get new dates without becoming another model.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from string import Template

CONFIGS = ("config.json", "params.json", "hf_quant_config.json", "quantize_config.json")
"""Read whole: they decide how much memory the model takes, and are small."""
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
TOKENIZERS = ("tokenizer*.json", "tokenizer.model*", "vocab.*", "merges.txt", "tekken.json", "*.tiktoken")

_MAX_CONFIG_BYTES = 16 << 20
_GONE = -1
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def identity(model: str, environ: Mapping[str, str], revision: str | None = None) -> str:
    """What the model is, on one line: equal for equal files.

    `environ` is the engine's, since that is where the hub's cache is set; `revision` is vLLM's argument. A hub id
    whose files are not here yet is named by the id alone, and by its commit as soon as they are.
    """
    path = Path(_expanded(model, environ)) if model.startswith("~") else Path(model)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return f"folder {_folder_hash(path)}"
        if stat.S_ISREG(mode):
            return f"file {_hash([path.name, path.stat().st_size])}"
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        return f"unreadable: {model}: {_reason(error)}"
    return _hub_identity(model, environ, revision)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _hub_identity(model: str, environ: Mapping[str, str], revision: str | None) -> str:
    if not _HUB_ID.fullmatch(model):
        return f"missing: {model}"
    commit = _commit(hub_cache(environ) / f"models--{model.replace('/', '--')}", revision or "main")
    return f"{model}@{commit or revision}" if commit or revision else model


def _commit(repository: Path, revision: str) -> str | None:
    """The commit that the cache has for a branch or tag; a commit is its own."""
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        with (repository / "refs" / revision).open() as file:
            text = file.read(100).strip()
    except (OSError, ValueError):
        return None
    return text if _COMMIT.fullmatch(text) else None


def snapshot(model: str, environ: Mapping[str, str], revision: str | None = None) -> Path | None:
    """The folder in the hub's cache with what has been downloaded of a model; None where there is none."""
    repository = hub_cache(environ) / f"models--{model.replace('/', '--')}"
    commit = _commit(repository, revision or "main") if _HUB_ID.fullmatch(model) else None
    folder = repository / "snapshots" / (commit or "?")
    return folder if folder.is_dir() else None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder of downloaded models, by the rules of huggingface_hub.constants: a variable that is empty is set."""
    home = environ.get("HF_HOME", str(Path(environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")))
    legacy = environ.get("HUGGINGFACE_HUB_CACHE", str(Path(_expanded(home, environ), "hub")))
    return Path(_expanded(environ.get("HF_HUB_CACHE", legacy), environ))


def _expanded(path: str, environ: Mapping[str, str]) -> str:
    home = environ.get("HOME")
    if home and (path == "~" or path.startswith("~/")):
        path = home.rstrip("/") + path[1:]
    return Template(path).safe_substitute(environ)


def _folder_hash(folder: Path) -> str:
    configs = [[name, _text_hash(folder / name)] for name in CONFIGS if (folder / name).is_file()]
    return _hash([configs, _sizes(folder, WEIGHTS), _sizes(folder, TOKENIZERS)])


def _sizes(folder: Path, patterns: tuple[str, ...]) -> list[list[str | int]]:
    """Names and bytes of the files right in the folder, which is where vLLM loads from."""
    # iterdir() and not glob(), which finds nothing in a folder that it may not read, and does not say so.
    found = sorted(path.name for path in folder.iterdir() if any(map(path.match, patterns)))
    return [[name, _size(folder / name)] for name in found]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return _GONE  # a link of the hub's cache to a blob that was removed


def _text_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(_MAX_CONFIG_BYTES)).hexdigest()


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
