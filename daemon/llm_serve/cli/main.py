"""The command line. Commands import what they need when they run, so that --help is instant."""

from __future__ import annotations

from pathlib import Path
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


def _instances(incomplete: str) -> list[str]:
    """Names for the shell to complete; without one that fits, it offers files."""
    from llm_serve.cli.reports import names

    return [name for name in names() if name.startswith(incomplete)]


Target = Annotated[
    str,
    typer.Argument(metavar="NAME|FILE", help="An instance in /etc/llm-serve, or a file.", autocompletion=_instances),
]
OneOrAll = Annotated[
    str | None, typer.Argument(metavar="NAME|FILE", help="One instance; all without it.", autocompletion=_instances)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"llm-serve {__version__}")
        raise typer.Exit


@app.callback()
def options(
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


@app.command(
    name="import", epilog="Example: llm-serve import -- vllm serve Qwen/Qwen3-8B --max-model-len 16k --port 8001"
)
def import_(
    source: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE | - | -- WORDS...]",
            help="A start script, a compose file, a vLLM YAML file, or `-` for stdin; or a command after `--`.",
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Write to this file instead of stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --output.")] = False,
    service: Annotated[str | None, typer.Option(metavar="NAME", help="Which service of a compose file.")] = None,
) -> None:
    """Make an instance file of the way vLLM was started: `vllm serve`, docker run, a script, compose, or YAML."""
    from pathlib import Path

    from llm_serve.cli.import_ import import_ as command

    raise typer.Exit(command(source or [], Path(output) if output else None, service, force=force))


@app.command(epilog='Example: llm-serve plan qwen7b --gpu "24GiB x 4"')
def plan(
    target: Target,
    gpu: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Plan for such GPUs, as 24GiB or 24GiB x 4, not for those here.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Show what a model takes of memory, what fits, and what recovery would do, without loading it."""
    from llm_serve.cli.plan import plan as command

    raise typer.Exit(command(target, gpu, json_output))


@app.command(epilog="Example: llm-serve status qwen7b")
def status(target: OneOrAll = None, json_output: Json = False) -> None:
    """Show what an instance is doing, and what limits it; or a line for each, stopped and failed ones too."""
    from llm_serve.cli.status import status as command

    raise typer.Exit(command(target, json_output))


@app.command(epilog="Example: llm-serve top qwen7b")
def top(
    target: OneOrAll = None,
    interval: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds from one look to the next.")] = 1,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, after one interval.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print a line of JSON at every interval.")] = False,
) -> None:
    """Watch an instance live: requests, KV cache, tokens/s, time to first token, GPUs, failures. `q` quits."""
    from llm_serve.cli.top import top as command

    raise typer.Exit(command(target, interval_s=interval, once=once, json_output=json_output))


@app.command(epilog="Example: . <(llm-serve completion bash)")
def completion(shell: Annotated[str, typer.Argument(metavar="bash|zsh|fish", help="For which shell.")]) -> None:
    """Print what makes a shell complete commands, options and the names of instances."""
    from llm_serve.cli.completion import completion as command

    raise typer.Exit(command(shell))


@app.command(epilog="Example: llm-serve targets --output /run/llm-serve/targets.json")
def targets(
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Replace this file instead of printing.")] = None,
    host: Annotated[
        str | None,
        typer.Option(help="How a Prometheus on another machine reaches this one; without it, Prometheus runs here."),
    ] = None,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where the instance files are.")] = Path("/etc/llm-serve"),
) -> None:
    """List the instances of this machine as JSON for Prometheus's file discovery."""
    from llm_serve.cli.targets import targets as command

    raise typer.Exit(command(output, host, folder))


@app.command(epilog="Example: llm-serve doctor qwen7b")
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE", help="Also look at what this instance asks for.", autocompletion=_instances
        ),
    ] = None,
    trials: Annotated[
        bool | None,
        typer.Option(
            "--trials/--no-trials", help="Run each attention backend; without either, unless the GPU is in use."
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each attention backend.")] = 40,
    json_output: Json = False,
) -> None:
    """Look at the machine: driver, GPUs, attention backends, limits; each finding with its remedy.

    The exit status is 75 when there is a problem, 78 when the instance's file is refused, else 0.
    """
    from llm_serve.cli.doctor import doctor as command

    raise typer.Exit(command(target, trials=trials, timeout_s=timeout, json_output=json_output))


@app.command(epilog="Example: llm-serve stress --gpus 0,1 --seconds 60 --png stress.png")
def stress(  # noqa: PLR0913 - as many as it has options
    *,
    gpus: Annotated[str, typer.Option(metavar="LIST", help="Which, as 0,2; all without it.")] = "",
    tests: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Which of operations, allocation, matmul, memory, precision, load; all without it."
        ),
    ] = "",
    seconds: Annotated[float, typer.Option(min=1, help="How long the full load lasts.")] = 60,
    max_celsius: Annotated[
        float | None,
        typer.Option(min=30, max=120, help="Stop a GPU there; without it, 3 below its own slow-down, else at 90."),
    ] = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Also where a GPU is in use, with half of what is free.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(help="Also draw temperature, power and TFLOPS (needs matplotlib).")
    ] = None,
    json_output: Json = False,
) -> None:
    """Test GPUs: arithmetic, all of their memory, speed in each format, and full load. Ctrl-C ends it with a report.

    The exit status is 0 when all tests passed, 70 when one failed, 75 without a GPU or when it is in use, 130 when
    interrupted.
    """
    from llm_serve.cli.stress import Given
    from llm_serve.cli.stress import stress as command

    raise typer.Exit(
        command(
            Given(
                gpus=gpus, tests=tests, seconds=seconds, max_celsius=max_celsius, beside=beside, png=png,
                json_output=json_output,
            )
        )
    )  # fmt: skip


@app.command(epilog="Example: llm-serve bench qwen7b --scenario chat --streams 1,16,64 --png chat.png")
def bench(  # noqa: PLR0913 - as many as it has options
    target: Annotated[
        str,
        typer.Argument(
            metavar="URL|NAME", help="http://HOST:PORT, or an instance or its file.", autocompletion=_instances
        ),
    ],
    *,
    scenario: Annotated[
        str, typer.Option(help="short, chat or mixed: answers of 50, of 150, of 50 and 400.")
    ] = "short",
    prompts: Annotated[Path | None, typer.Option(help="Own prompts: one a line, or JSON objects.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer to own prompts (150).")] = None,
    streams: Annotated[str, typer.Option(help="So many requests always running: 1,8,64,256.")] = "",
    rates: Annotated[str, typer.Option(help="Instead: so many requests a second, whatever comes back: 5,10,20.")] = "",
    constant: Annotated[bool, typer.Option("--constant", help="Rates come evenly, not by chance (Poisson).")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long a step lasts.")] = 30,
    requests: Annotated[int | None, typer.Option(min=1, help="Instead: so many requests a stream.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests a stream before each step, not counted.")] = 1,
    thinking: Annotated[bool | None, typer.Option("--thinking/--no-thinking", help="enable_thinking.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="All answers have their full length.")] = True,
    completions: Annotated[bool, typer.Option("--completions", help="Ask /v1/completions.")] = False,
    model: Annotated[str | None, typer.Option(help="Which model; the server's first without it.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Longest time for one request.")] = 600,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    png: Annotated[Path | None, typer.Option(help="Also draw it (needs matplotlib).")] = None,
    json_output: Json = False,
) -> None:
    """Load a server, print its figures, and name what limits it. OPENAI_API_KEY may hold a key."""
    from llm_serve.cli.bench import Given
    from llm_serve.cli.bench import bench as command

    raise typer.Exit(
        command(
            Given(
                target=target, scenario=scenario, prompts=prompts, tokens=tokens, streams=streams, rates=rates,
                constant=constant, seconds=seconds, requests=requests, warm_up=warm_up, thinking=thinking,
                ignore_eos=ignore_eos, completions=completions, model=model, timeout_s=timeout_s, seed=seed,
                json_output=json_output, png=png,
            )
        )
    )  # fmt: skip


@app.command(epilog="Example: llm-serve router --check")
def router(
    file: Annotated[Path, typer.Argument(help="The router's file.")] = Path("/etc/llm-serve/router.toml"),
    check: Annotated[
        bool, typer.Option("--check", help="Judge the file, and print the command line of vllm-router instead.")
    ] = False,
) -> None:
    """Serve several instances of one model at one address, with vllm-router, as its unit does."""
    from llm_serve.cli.router import router as command

    raise typer.Exit(command(file, check=check))


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


@app.command(epilog="Example: llm-serve setup --backend cuda")
def setup(  # noqa: PLR0913 - as many as it has options
    *,
    backend: Annotated[str, typer.Option(help="Which build of vLLM: auto, cpu or cuda.")] = "auto",
    find_links: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Take every package from here; no network.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the environments.")] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the environment before this one.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what is neither of the two nor in use.")] = False,
    json_output: Json = False,
) -> None:
    """Build the environment that instances run in, below /opt/llm-serve, and make it the current one."""
    from llm_serve.cli.setup import setup as command

    chosen = {"--list": list_, "--rollback": rollback, "--prune": prune, "--json": json_output}
    words = ["--backend", backend] + (["--find-links", find_links] if find_links else [])
    raise typer.Exit(command([*words, *(word for word, is_given in chosen.items() if is_given)]))


def main() -> None:
    """The console script."""
    app()
