"""The command line. Commands import what they need when they run, so that --help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_serve import __version__

app = typer.Typer(
    name="llm-serve",
    help="Keep a local LLM served, whatever happens to its engine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Target = Annotated[str, typer.Argument(metavar="NAME|FILE", help="An instance in /etc/llm-serve, or a file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"llm-serve {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command(epilog="Example: llm-serve run /etc/llm-serve/qwen7b.toml")
def run(target: Target) -> None:
    """Serve one instance in the foreground, as its unit does."""
    from llm_serve.cli.run import run as command

    raise typer.Exit(command(target))


@app.command(epilog="Example: llm-serve demo --listen 127.0.0.1:8001")
def demo(listen: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1:8000") -> None:
    """Serve the embedded model SmolLM2-135M-Instruct on the CPU, with no configuration."""
    from llm_serve.cli.demo import demo as command

    raise typer.Exit(command(listen))


@app.command(epilog="Example: llm-serve check qwen7b")
def check(target: Target, json_output: Json = False) -> None:
    """Validate an instance file, and print the plan that an engine would be started with."""
    from llm_serve.cli.check import check as command

    raise typer.Exit(command(target, json_output))


@app.command(epilog="Example: llm-serve status qwen7b")
def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One instance; all without it.")] = None,
    json_output: Json = False,
) -> None:
    """Show what an instance is doing."""
    from llm_serve.cli.status import status as command

    raise typer.Exit(command(name, json_output))


@app.command(epilog="Example: llm-serve reset qwen7b")
def reset(target: Target, json_output: Json = False) -> None:
    """Forget what recovery learned about an instance: smaller plans, fallbacks and the last failures."""
    from llm_serve.cli.reset import reset as command

    raise typer.Exit(command(target, json_output))


@app.command(epilog="Example: llm-serve reload qwen7b")
def reload(target: Target, json_output: Json = False) -> None:
    """Let a running instance serve what its file says now; a file that is wrong changes nothing."""
    from llm_serve.cli.reload import reload as command

    raise typer.Exit(command(target, json_output))


@app.command(epilog="Example: llm-serve drain --wait qwen7b")
def drain(
    target: Target,
    wait: Annotated[bool, typer.Option("--wait", help="Return when no request is in flight.")] = False,
    json_output: Json = False,
) -> None:
    """Stop admission without stopping the engine: new requests wait, those in flight finish."""
    from llm_serve.cli.drain import drain as command

    raise typer.Exit(command(target, wait, json_output))


@app.command(epilog="Example: llm-serve resume qwen7b")
def resume(target: Target, json_output: Json = False) -> None:
    """Resume admission after `drain`."""
    from llm_serve.cli.drain import resume as command

    raise typer.Exit(command(target, json_output))


def main() -> None:
    """The console script."""
    app()
