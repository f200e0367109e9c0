"""`llm-serve import`: the way in which vLLM was started until now becomes an instance file.

Nothing is run, and no file that a script names is read but vLLM's own `--config`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_serve.core.errors import ConfigError
from llm_serve.core.launch import Launch, NotImportable
from llm_serve.core.shell import ShellError

if TYPE_CHECKING:
    from llm_serve.core.flags import Catalogue

_WRONG_USAGE = 2
_BAD_CONFIGURATION = 78
_LONGEST_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be imported: words, or a text with the name that messages give it."""

    words: tuple[str, ...] = ()
    text: str = ""
    name: str = ""
    folder: Path = Path()


def import_(words: list[str], output: Path | None, service: str | None, *, force: bool) -> int:
    """Print the instance file, or write it to `output`. Returns the exit status."""
    if output is not None and output.exists() and not force:
        return _refused(_exists(output))
    try:
        source = _source(words)
        text = _imported(source, service, output)
        _deliver(text, output, force=force)
    except (NotImportable, ShellError) as error:
        return _refused(str(error))
    return _judged(text, output)


def _refused(message: str) -> int:
    print(f"llm-serve: import: {message}", file=sys.stderr)
    return _WRONG_USAGE


def _exists(output: Path) -> str:
    return f"{output} exists already: give another name, or --force to replace it"


def _source(words: list[str]) -> Source:
    """A file, stdin, or the words of a command."""
    if len(words) > 1:
        return Source(words=tuple(words))
    if words in ([], ["-"]):
        if not words and sys.stdin.isatty():
            raise NotImportable("give a file, `-` for stdin, or `-- vllm serve ...`")
        return Source(text=_decoded(sys.stdin.buffer.read(), "stdin"), name="stdin")
    path = Path(words[0])
    try:
        return Source(text=_decoded(path.read_bytes(), str(path)), name=str(path), folder=path.parent)
    except OSError as error:
        raise NotImportable(f"{path} cannot be read: {error.strerror}. A command goes after --") from error


def _decoded(raw: bytes, name: str) -> str:
    if len(raw) > _LONGEST_CHARACTERS:
        raise NotImportable(f"{name} is longer than {_LONGEST_CHARACTERS} bytes: no start script is")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise NotImportable(f"{name} is not text in UTF-8") from error


def _imported(source: Source, service: str | None, output: Path | None) -> str:
    """Return the file's text. What can be wrong without vLLM is said before the seconds that importing it takes."""
    from llm_serve.core.importing import config_words, draft_of
    from llm_serve.core.instance_text import instance_text

    try:
        mapping = None if source.words else _mapping(source)
        found = _found(source, mapping, service)
        catalogue = _catalogue()
        launch, origin = found or (Launch(config_words(mapping or {}, catalogue)), "A vLLM configuration")
        launch = _with_config(launch, source.folder, catalogue)
        draft = draft_of(launch, catalogue, name=output.stem if output else "")
    except (NotImportable, ShellError) as error:
        raise NotImportable(f"{source.name}: {error}" if source.name else str(error)) from error
    _refuse_what_vllm_refuses(draft)
    return instance_text(draft, origin)


def _found(source: Source, mapping: Mapping[str, Any] | None, service: str | None) -> tuple[Launch, str] | None:
    """Return the launch and what it was; None for vLLM's own YAML, which takes vLLM to read."""
    from llm_serve.core.importing import compose_launch, launch_of, launch_of_script

    variables = {"HOME": str(Path.home())}
    if mapping is not None and (mapping.keys() & {"services", "image", "command"} or _holds_services(mapping)):
        return compose_launch(mapping, service, variables), "A compose service"
    if service is not None:
        raise NotImportable("--service names one of a compose file, and this is none")
    if source.words:
        return launch_of(source.words), "A command line"
    return (launch_of_script(source.text, variables), "A start script") if mapping is None else None


def _mapping(source: Source) -> Mapping[str, Any] | None:
    """Return the text as YAML, if it is YAML and no shell text that looks like it."""
    import yaml

    try:
        value = yaml.safe_load(source.text)
    except yaml.YAMLError as error:
        if source.name.endswith((".yaml", ".yml")):
            mark = getattr(error, "problem_mark", None)
            place = f"line {mark.line + 1}: " if mark else ""
            raise NotImportable(f"{place}not YAML: {getattr(error, 'problem', None) or error}") from error
        return None
    if isinstance(value, dict) and all(re.fullmatch(r"[\w.-]+", str(key)) for key in value):
        if "apiVersion" in value:
            raise NotImportable("is a manifest of Kubernetes: give the words of its container after --")
        return {str(key): each for key, each in value.items()}
    if source.name.endswith((".yaml", ".yml")):
        raise NotImportable("holds no options: a vLLM configuration or a compose file is a mapping")
    return None


def _holds_services(mapping: Mapping[str, Any]) -> bool:
    """True for services without the line `services:` above them."""
    return bool(mapping) and all(
        isinstance(each, dict) and each.keys() & {"image", "build"} for each in mapping.values()
    )


def _catalogue() -> Catalogue:
    from llm_serve.cli.check import prepare_for_vllm

    prepare_for_vllm()
    from llm_serve.engine.absent_gpus import pretend_if_none_is_seen

    pretend_if_none_is_seen()
    from llm_serve.engine.catalogue import catalogue

    return catalogue()


def _with_config(launch: Launch, folder: Path, catalogue: Catalogue) -> Launch:
    """Put the options of `--config FILE` in front of the others, as vLLM does; one that is not here stays."""
    import yaml

    from llm_serve.core.importing import config_words

    args = list(launch.args)
    for index, word in enumerate(args):
        flag, equals, value = word.partition("=")
        value = value if equals else "".join(args[index + 1 : index + 2])
        if flag != "--config" or not value:
            continue
        path = folder / value
        try:
            config = yaml.safe_load(path.read_bytes())
        except (OSError, ValueError, yaml.YAMLError):
            return launch
        if not isinstance(config, dict):
            return launch
        rest = (*args[:index], *args[index + (1 if equals else 2) :])
        model = rest[:1] if rest and not rest[0].startswith("-") else ()
        return replace(launch, args=(*model, *config_words(config, catalogue), *rest[len(model) :]))
    return launch


def _refuse_what_vllm_refuses(draft: Any) -> None:
    from llm_serve.engine.catalogue import refusal

    for option, value in list(draft.engine.items()):
        if (why := refusal(option, value)) is not None:
            draft.refuse(option, why)


def _deliver(text: str, output: Path | None, *, force: bool) -> None:
    if output is None:
        sys.stdout.write(text)
        return
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        with os.fdopen(os.open(output, flags, 0o640), "w") as file:
            file.write(text)
    except FileExistsError as error:
        raise NotImportable(_exists(output)) from error
    except OSError as error:
        raise NotImportable(f"{output} cannot be written: {error.strerror}") from error


def _judged(text: str, output: Path | None) -> int:
    """Let our own reader and vLLM's parser judge the result: what they refuse was wrong before, and is said."""
    from llm_serve.core.instance_file import parse_instance
    from llm_serve.core.plan import EnginePlan
    from llm_serve.engine import arguments

    source = str(output or "the result")
    try:
        settings = parse_instance(text, source=source, name="imported")
        arguments.parse_plan(EnginePlan.from_settings(settings), source=source, text=text)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return _BAD_CONFIGURATION
    if output is not None:
        print(f"{output} is written. Next: llm-serve check {output}", file=sys.stderr)
    return 0
