"""What can be known about a model's folder without loading it: are its files there, and whole.

Only names, sizes and the headers of safetensors files are read, so a folder of 100 GB is judged in
milliseconds. A start that is going to fail for its files should fail before a GPU is touched, and name
the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llm_serve.core.errors import ConfigError, Problem
from llm_serve.core.toml_lines import locate

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "*.tiktoken",
    "*.gguf",
)
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses longer headers itself."""

_DOWNLOAD_AGAIN = "Download the file again"


def looks_like_path(model: str) -> bool:
    """True when `model` can only be meant as a folder, not as a hub id."""
    return model.startswith(("/", ".", "~"))


def check_weights(model_path: str, *, source: str = "", text: str | None = None) -> None:
    """Raise ConfigError when the weights in a local folder are absent, incomplete or not weights at all."""
    _raise_problems(_weight_problems(Path(model_path)), source, text)


def check_tokenizer(model_path: str, *, source: str = "", text: str | None = None) -> None:
    """Raise ConfigError when a local folder holds nothing that a tokenizer could be made from."""
    folder = Path(model_path)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_PATTERNS):
        hint = "Copy tokenizer.json and tokenizer_config.json into it, or set engine.tokenizer"
        _raise_problems(iter([(f"{folder} has no tokenizer", hint)]), source, text)


def are_here(model: str, snapshot: Path | None) -> bool:
    """True where nothing of a model's weights has to be downloaded; `snapshot` has what was, of a hub id.

    A path is never downloaded: what is wrong with it is for others to say.
    """
    if looks_like_path(model) or Path(model).exists():
        return True
    return snapshot is not None and not any(_weight_problems(snapshot))


def stored_bytes(model: str) -> int | None:
    """Return the bytes of all tensors in a model's safetensors files, by their headers; None where none are here."""
    folder = _folder_of(model)
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if len(files) > 1:
        # Some repositories have all weights once more in one file.
        files = [path for path in files if not path.name.startswith("consolidated")]
    sizes = [size for path in files if (size := _tensor_bytes(path)) is not None]
    return sum(sizes) if sizes else None


def _folder_of(model: str) -> Path | None:
    """The folder that has a model's files, in the hub's cache for a hub id."""
    folder = Path(model).expanduser()
    if folder.is_dir() or looks_like_path(model):
        return folder
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _tensor_bytes(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            lengths = _lengths(file, path.stat().st_size)
    except OSError:
        return None
    return None if lengths is None else lengths[1]


def _raise_problems(found: Iterator[tuple[str, str]], source: str, text: str | None) -> None:
    line = locate(text, "model") if text is not None else None
    problems = [Problem(source, line, "model", message, hint) for message, hint in found]
    if problems:
        raise ConfigError(problems)


def _weight_problems(folder: Path) -> Iterator[tuple[str, str]]:
    try:
        weights = sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)})
        yield from _missing_from_index(folder)
        if not weights:
            wanted = ", ".join(WEIGHT_PATTERNS)
            yield f"{folder} has no weights: no {wanted}", "Download the model's files into it"
        for path in weights:
            yield from _file_problems(path)
    except OSError as error:
        yield f"{error.filename} cannot be read: {error.strerror}", "Let the service's user read it"


def _missing_from_index(folder: Path) -> Iterator[tuple[str, str]]:
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            yield f"{index} is not an index of weights", _DOWNLOAD_AGAIN
            continue
        # exists() follows links: a link of the hub's cache to a blob that is gone counts as missing.
        missing = sorted(name for name in named if not (folder / name).exists())
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            lack = f"{len(missing)} of the {len(named)} files that {index.name} names are missing"
            yield f"{folder}: {lack}: {shown}", "Download the missing files"


def _file_problems(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        yield f"{path} is a link to a file that is gone", _DOWNLOAD_AGAIN
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            yield f"{path} is a git-lfs pointer of {size} bytes, not weights", "Run `git lfs pull` there"
        elif size == 0:
            yield f"{path} is empty", _DOWNLOAD_AGAIN
        elif path.suffix == ".safetensors":
            file.seek(0)
            yield from _length_problems(path, size, _expected_bytes(file, size))


def _length_problems(path: Path, size: int, expected: int | None) -> Iterator[tuple[str, str]]:
    if expected is None:
        yield f"{path} ({size} bytes) has no valid safetensors header", _DOWNLOAD_AGAIN
    elif size < expected:
        yield f"{path} is truncated: {size} of {expected} bytes", _DOWNLOAD_AGAIN
    elif size > expected:
        yield f"{path} is too long: {size} bytes instead of {expected}", _DOWNLOAD_AGAIN


def _expected_bytes(file: BinaryIO, size: int) -> int | None:
    """Return the size that the header promises, or None when there is no header to believe."""
    lengths = _lengths(file, size)
    return None if lengths is None else sum(lengths)


def _lengths(file: BinaryIO, size: int) -> tuple[int, int] | None:
    """Return the bytes of the header and of the tensors behind it, as the header has them."""
    prefix = file.read(8)
    if len(prefix) < 8:
        return None
    header_bytes = int(struct.unpack("<Q", prefix)[0])
    if header_bytes > MAX_HEADER_BYTES:
        return None
    if 8 + header_bytes > size:
        return 8 + header_bytes, 0
    try:
        header = json.loads(file.read(header_bytes))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return 8 + header_bytes, max(ends, default=0)
