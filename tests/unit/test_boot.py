"""What must be there before an engine: places to write, with room in them, and a private folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_serve.core.errors import ConfigError, HostError
from llm_serve.host import boot


@pytest.fixture(autouse=True)
def _room_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("llm_serve.host.boot.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("llm_serve.host.boot.shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))


def test_caches_are_known_by_their_variables() -> None:
    """Each variable that is set names a place; without XDG_CACHE_HOME it is the home folder's."""
    assert {"HF_HOME": Path("/h"), "HOME": Path("/home/a/.cache")} == boot.cache_folders(
        {"HF_HOME": "/h", "HOME": "/home/a", "TRITON_CACHE_DIR": ""}
    )
    assert {"XDG_CACHE_HOME": Path("/c")} == boot.cache_folders({"XDG_CACHE_HOME": "/c", "HOME": "/home/a"})
    assert {"HOME": Path("/.cache")} == boot.cache_folders({})


def test_a_host_with_room_is_ready(tmp_path: Path) -> None:
    """Folders that are not there yet are made, and nothing is left in them."""
    boot.check_host({"HF_HOME": str(tmp_path / "a/b"), "XDG_CACHE_HOME": str(tmp_path / "c")})

    assert [] == list((tmp_path / "a/b").iterdir())


def test_every_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A wrong place stays wrong: status 78, with each variable and what to do."""
    (tmp_path / "file").write_text("")
    environment = {"HF_HOME": f"{tmp_path}/file/a", "VLLM_CACHE_ROOT": f"{tmp_path}/file", "HOME": str(tmp_path)}

    with pytest.raises(ConfigError) as refused:
        boot.check_host(environment)

    assert ["VLLM_CACHE_ROOT", "HF_HOME"] == [problem.path for problem in refused.value.problems]
    assert f"cannot write to {tmp_path}/file" in str(refused.value)
    assert "or set HF_HOME to a folder" in str(refused.value)


def test_a_variable_that_opens_the_engine_is_refused(tmp_path: Path) -> None:
    """Whoever started the daemon with it reads why, and what allows it; one that is off may stay."""
    place = {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    boot.check_host(place | {"VLLM_SERVER_DEV_MODE": "0", "LD_PRELOAD": "/lib/tcmalloc.so", "PYTHONPATH": "/a"})
    boot.check_host(place | {"VLLM_SERVER_DEV_MODE": "1"}, ("VLLM_SERVER_DEV_MODE",))

    with pytest.raises(ConfigError) as refused:
        boot.check_host(place | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "yes"})

    assert {"VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION"} == {
        problem.path for problem in refused.value.problems
    }
    assert 'set server.allow_env = ["VLLM_SERVER_DEV_MODE"]' in str(refused.value)


def test_a_full_disk_is_named_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room may come: status 75, with how much there is and where."""
    monkeypatch.setattr("llm_serve.host.boot.shutil.disk_usage", lambda _: SimpleNamespace(free=3 << 20))

    with pytest.raises(HostError, match=r"only 3 MiB are free on the disk of .*HF_HOME"):
        boot.check_host({"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})


def test_a_disk_too_full_for_a_folder_is_named_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When not even the folder can be made, the room is measured where it would be."""
    asked: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        asked.append(folder)
        return SimpleNamespace(free=0)

    def mkdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llm_serve.host.boot.shutil.disk_usage", usage)
    monkeypatch.setattr(Path, "mkdir", mkdir)

    with pytest.raises(HostError, match="only 0 MiB are free"):
        boot.check_host({"HF_HOME": f"{tmp_path}/a/b", "XDG_CACHE_HOME": str(tmp_path)})
    assert [tmp_path] == asked


def test_systemd_s_folder_is_used(tmp_path: Path) -> None:
    """The first of RUNTIME_DIRECTORY is the instance's own already."""
    given = tmp_path / "qwen"

    assert given == boot.runtime_folder("qwen", {"RUNTIME_DIRECTORY": f"{given}:{tmp_path}/other"})
    assert given.is_dir()


def test_a_users_folder_is_private(tmp_path: Path) -> None:
    """Without systemd the folder is the user's, closed to others, and named after the instance."""
    folder = boot.runtime_folder("qwen", {"XDG_RUNTIME_DIR": str(tmp_path)})

    assert tmp_path / "llm-serve/qwen" == folder
    assert 0o700 == stat.S_IMODE(folder.stat().st_mode)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets are not put where another user could replace them."""
    (tmp_path / "qwen").mkdir()
    monkeypatch.setattr("llm_serve.host.boot.os.getuid", lambda: 54321)

    with pytest.raises(ConfigError, match="belongs to another user"):
        boot.runtime_folder("qwen", {"RUNTIME_DIRECTORY": str(tmp_path / "qwen")})


def test_a_trap_among_the_temporary_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all may write, the first part of the path is checked before anything is put below it."""
    monkeypatch.setattr("llm_serve.host.boot.os.getuid", lambda: 987654321)
    base = Path("/tmp/llm-serve-987654321")

    with contextlib.ExitStack() as cleaning:
        cleaning.callback(shutil.rmtree, base, ignore_errors=True)
        with pytest.raises(ConfigError, match=str(base)):
            boot.runtime_folder("qwen", {})

        assert [] == list(base.iterdir())
        assert 0o700 == stat.S_IMODE(base.stat().st_mode)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"), ({"STATE_DIRECTORY": ""}, "/run/a"), ({}, "/run/a")],
)
def test_state_outlives_the_processes_where_systemd_has_a_place_for_it(
    environment: dict[str, str], expected: str
) -> None:
    """The first of STATE_DIRECTORY, and outside of a unit the runtime folder."""
    assert Path(expected) == boot.state_folder(Path("/run/a"), environment)


def test_a_runtime_folder_is_claimed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes second is told to try again, until the first one has ended."""
    monkeypatch.setattr("llm_serve.host.boot._LONGEST_RUNTIME_BYTES", 4096)
    claim = boot.claim(tmp_path)

    with pytest.raises(HostError, match="runs already"):
        boot.claim(tmp_path)
    os.close(claim)
    os.close(boot.claim(tmp_path))

    assert [] == list(tmp_path.iterdir())


def test_a_runtime_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    """The limit is that of the longest socket in it, and it is said before anything is bound."""
    deep = tmp_path / ("x" * 80)
    deep.mkdir()

    with pytest.raises(ConfigError, match="too many for the sockets"):
        boot.claim(deep)
