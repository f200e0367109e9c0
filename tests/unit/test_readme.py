"""README as read by tests: which of its words are commands, and whether its options, defaults, links and figures' homes exist."""

from __future__ import annotations

import re
import tomllib

import pytest
import typer
from typer.core import TyperGroup

from llm_serve.cli.main import app
from llm_serve.core.instance_file import parse_instance
from llm_serve.core.settings import LimitSettings, Settings
from tests.readme import README, commands, configuration, fragments, options

TEXT = README.read_text()
PAGE = """# Title

Say `llm-serve status`, not `max_model_len`, `front_ends = 4`, `GET /status?since=0` or `--json`.

    make demo      # with a comment, which names `make test`
    rm -rf '#this'

## Two

| `podman run it` | a table |

```sh
first

second | third # why
```

```toml
model = "a"
```

At a line's end `systemctl
status` counts too.
"""


def test_commands_are_found_wherever_they_stand() -> None:
    """In prose, in a table, indented and fenced; comments, settings, options and requests are none."""
    found = [(each.section, each.text) for each in commands(PAGE)]

    assert found == [
        ("Title", "llm-serve status"),
        ("Title", "make demo"),
        ("Title", "rm -rf '#this'"),
        ("Two", "podman run it"),
        ("Two", "first"),
        ("Two", "second | third"),
        ("Two", "systemctl status"),
    ]


def test_options_and_the_file_are_found() -> None:
    assert {"--json"} == options(PAGE)
    assert 'model = "a"\n' == configuration(PAGE)


def test_every_option_that_is_named_is_one() -> None:
    """Of one of our commands, or of `setup`, which is not in this environment."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    known = {
        name
        for each in group.commands.values()
        for param in each.params
        for name in (*param.opts, *param.secondary_opts)
    }
    known |= set(re.findall(r'"(--[a-z-]+)"', (README.parent / "packaging/setup").read_text()))

    assert set() == options(TEXT) - known


def test_the_file_that_is_shown_has_the_defaults() -> None:
    """But for what README names: the model, the keys, and the engine's own arguments."""
    shown = configuration(TEXT)
    written = tomllib.loads(shown)
    default = Settings(model="any", name="any", source="").model_dump(mode="json")

    assert parse_instance(shown, source="README.md", name="qwen7b").model == written["model"]
    assert {"model", "server", "engine", "recovery", "network", "log"} == written.keys()
    for table in ("server", "recovery", "network", "log"):
        for name, value in written[table].items():
            assert name == "api_keys" or default[table][name] == value, name


def test_what_is_shown_of_other_files_is_accepted() -> None:
    parts = fragments(TEXT)[1:]
    assert parts
    for part in parts:
        parse_instance(f'model = "any"\n{part}', source="README.md", name="any")


def test_limits_are_quoted_as_they_are() -> None:
    default = LimitSettings().model_dump()
    quoted = dict(re.findall(r"`(max_\w+)\s=\s(\d+)`", TEXT))

    assert {name: int(value) for name, value in quoted.items()} == {name: default[name] for name in quoted}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((#[^)]+)\)", TEXT))))
def test_links_lead_to_a_heading(link: str) -> None:
    headings = [
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()) for line in TEXT.splitlines() if line.startswith("#")
    ]

    assert link.lstrip("#") in {heading.replace(" ", "-") for heading in headings}
