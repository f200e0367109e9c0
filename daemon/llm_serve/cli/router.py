"""`llm-serve router`: judges the router's file and becomes vllm-router, with the options that fit its instances."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from llm_serve.core import router as core
from llm_serve.core.errors import ConfigError, HostError, LlmServeError, Problem
from llm_serve.core.settings import Settings
from llm_serve.core.toml_lines import locate_within
from llm_serve.host.instances import read_instance, read_text


def router(file: Path, *, check: bool) -> int:
    """Become vllm-router; with `check` only print its command line. Returns 75 or 78 with the reason on stderr."""
    try:
        command, notes = command_line(file)
    except LlmServeError as error:
        print(error if isinstance(error, ConfigError) else f"llm-serve: router: {error}", file=sys.stderr)
        return error.exit_status
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if check:
        print(shlex.join(command))
        return 0
    return _become(command)


def command_line(file: Path) -> tuple[list[str], list[str]]:
    """The command, and what is to be known beside it. Raises ConfigError, or HostError without vllm-router."""
    text = read_text(file)
    settings = core.RouterSettings.parse(text, str(file))
    reader = _Instances(file, text)
    urls = tuple(filter(None, (reader.url(place, each) for place, each in enumerate(settings.instances))))
    reader.refuse_if_unlike()
    if reader.problems:
        raise ConfigError(reader.problems)
    notes = [
        f"{url} is another machine's: the unit reaches it with IPAddressAllow= in a drop-in"
        for url in urls
        if core.is_elsewhere(url)
    ]
    return [program(), *core.arguments(settings, urls)], notes


def program() -> str:
    """The path of vllm-router: that of the own environment, else the first in PATH."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which("vllm-router", path=beside) or shutil.which("vllm-router")
    if found is None:
        raise HostError(
            f"vllm-router is in neither {beside} nor PATH. `llm-serve setup` installs it (or `make setup`);"
            f" by hand `{sys.executable} -m pip install --no-deps vllm-router orjson`."
        )
    return found


class _Instances:
    """What the instances that a router names are, and what is wrong with them."""

    def __init__(self, file: Path, text: str) -> None:
        self.problems: list[Problem] = []
        self._file, self._text = file, text
        self._local: dict[int, Settings] = {}

    def url(self, place: int, instance: str) -> str | None:
        """The address of one, or None when it was refused."""
        if core.is_address(instance):
            if message := core.address_problem(instance):
                self._refuse(place, message)
                return None
            return instance.rstrip("/")
        try:
            settings, _ = read_instance(instance, self._file.parent)
            self._local[place] = settings
            return core.url_of(settings)
        except ConfigError as error:
            self.problems += error.problems
            self._refuse(place, f"the file of {instance} is refused")
        except ValueError as error:
            self._refuse(place, str(error))
        return None

    def refuse_if_unlike(self) -> None:
        """A request goes to any of them: the same model must answer."""
        names = {place: core.model_name(settings) for place, settings in self._local.items()}
        first = next(iter(names.values()), "")
        for place, name in names.items():
            if name != first:
                message = f"{self._local[place].name} serves {name}, others {first}: a request goes to any of them"
                self._refuse(place, message, "Give them the same engine.served_model_name, or a router each")

    def _refuse(self, place: int, message: str, hint: str | None = None) -> None:
        path = f"instances.{place}"
        self.problems.append(Problem(str(self._file), locate_within(self._text, path), path, message, hint))


def _become(command: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted
