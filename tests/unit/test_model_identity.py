"""Which changes make another model, and which do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

from llm_serve.host.model_identity import hub_cache, identity

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two shards."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 64}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model-1.safetensors").write_bytes(b"\0" * 100)
    (model / "model-2.safetensors").write_bytes(b"\0" * 50)
    (model / "README.md").write_text("A model.")
    return model


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda it: (it / "config.json").write_text('{"hidden_size": 65}'), id="config of the same size"),
        pytest.param(lambda it: (it / "hf_quant_config.json").write_text("{}"), id="quantized"),
        pytest.param(lambda it: (it / "params.json").write_text("{}"), id="Mistral's config"),
        pytest.param(lambda it: (it / "model-2.safetensors").write_bytes(b"\0" * 51), id="a weight file grew"),
        pytest.param(lambda it: (it / "model-2.safetensors").unlink(), id="a weight file went"),
        pytest.param(lambda it: (it / "adapter.bin").write_bytes(b""), id="a weight file came"),
        pytest.param(lambda it: (it / "model-2.safetensors").rename(it / "model-3.safetensors"), id="another name"),
        pytest.param(lambda it: (it / "tokenizer.json").write_text("{ }"), id="tokenizer"),
        pytest.param(lambda it: (it / "vocab.json").write_text("{}"), id="vocabulary"),
    ],
)
def test_other_files_are_another_model(folder: Path, change: Callable[[Path], object]) -> None:
    """Everything that decides how much memory a model takes counts, and so does its tokenizer."""
    before = identity(str(folder), {})
    change(folder)

    assert before != identity(str(folder), {})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda it: os.utime(it / "config.json", (0, 0)), id="dates"),
        pytest.param(lambda it: (it / "README.md").write_text("The model."), id="a file that is not loaded"),
        pytest.param(lambda it: (it / "config.json").chmod(0o600), id="permissions"),
        pytest.param(lambda it: (it / ".cache").mkdir(), id="what the hub's client leaves"),
    ],
)
def test_the_same_files_are_the_same_model(folder: Path, change: Callable[[Path], object]) -> None:
    """What is not loaded does not count."""
    before = identity(str(folder), {})
    change(folder)

    assert before == identity(str(folder), {})


def test_a_folder_may_move_and_be_reached_in_any_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy, a link, a relative path and one from the home folder name the same model."""
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    (folder.parent / "link").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    places = (str(copy), str(folder.parent / "link"), "model", "./model", "~/model", f"{folder}/")

    assert {identity(str(folder), {})} == {identity(place, {"HOME": str(folder.parent)}) for place in places}


def test_no_weight_is_read(folder: Path) -> None:
    """A model of 10 TB is named at once: these files are all hole, and reading them would take an hour."""
    for number in range(10):
        with (folder / f"big-{number}.safetensors").open("wb") as file:
            file.truncate(1 << 40)

    assert identity(str(folder), {}).startswith("folder ")


def test_a_link_to_nothing_is_a_state_of_its_own(folder: Path) -> None:
    """The hub's cache loses blobs: such a folder is named all the same, and differs from a whole one."""
    whole = identity(str(folder), {})
    (folder / "model-1.safetensors").unlink()
    without = identity(str(folder), {})
    (folder / "model-1.safetensors").write_bytes(b"")
    empty = identity(str(folder), {})
    (folder / "model-1.safetensors").unlink()
    (folder / "model-1.safetensors").symlink_to("../blobs/gone")

    assert 4 == len({whole, without, empty, identity(str(folder), {})})


def test_a_single_file_is_its_name_and_size(tmp_path: Path) -> None:
    """As a GGUF file is given."""
    (tmp_path / "a.gguf").write_bytes(b"123")
    before = identity(f"{tmp_path}/a.gguf", {})
    (tmp_path / "a.gguf").write_bytes(b"1234")

    assert before.startswith("file ")
    assert before != identity(f"{tmp_path}/a.gguf", {})


def test_a_folder_that_cannot_be_read_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is no hash of nothing, which an empty folder would share."""

    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)

    assert f"unreadable: {folder}: Permission denied" == identity(str(folder), {})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("/nowhere/model", "missing: /nowhere/model"),
        ("", "folder "),
        ("a\0b", "unreadable: a\0b: embedded null byte"),
        ("x" * 5000, "unreadable: xxx"),
        ("~/model", "missing: ~/model"),
        ("../../etc/passwd/x", "missing: ../../etc/passwd/x"),
    ],
    ids=["missing", "empty", "nul", "too long", "no home", "upwards"],
)
def test_nothing_raises(model: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written in the file as a model has a name, if only that it is not there."""
    monkeypatch.chdir(tmp_path)

    assert identity(model, {"HOME": str(tmp_path)}).startswith(expected)


def cached(cache: Path, model: str, ref: str, content: str) -> None:
    """As the hub's client leaves a branch or tag."""
    path = cache / file_download.repo_folder_name(repo_id=model, repo_type="model") / "refs" / ref
    path.parent.mkdir(parents=True)
    path.write_text(content)


@pytest.mark.parametrize(
    ("ref", "content", "revision", "expected"),
    [
        pytest.param("main", COMMIT, None, f"org/name@{COMMIT}", id="main"),
        pytest.param("main", COMMIT + "\n", None, f"org/name@{COMMIT}", id="line end"),
        pytest.param("v1.0", COMMIT, "v1.0", f"org/name@{COMMIT}", id="tag"),
        pytest.param("refs/pr/7", COMMIT, "refs/pr/7", f"org/name@{COMMIT}", id="pull request"),
        pytest.param("main", COMMIT, OTHER, f"org/name@{OTHER}", id="a commit is its own"),
        pytest.param("main", COMMIT, "v1.0", "org/name@v1.0", id="tag that is not here"),
        pytest.param("v1.0", COMMIT, None, "org/name", id="main is not here"),
        pytest.param("main", "", None, "org/name", id="torn reference"),
        pytest.param("main", COMMIT[:20], None, "org/name", id="half a reference"),
        pytest.param("main", "../../secret", None, "org/name", id="no commit"),
    ],
)
def test_a_hub_id_is_named_by_its_commit(
    ref: str, content: str, revision: str | None, expected: str, tmp_path: Path
) -> None:
    """The commit that the cache has for the revision; without one the id has to do."""
    cached(tmp_path, "org/name", ref, content)

    assert expected == identity("org/name", {"HF_HUB_CACHE": str(tmp_path)}, revision)


CACHES: tuple[tuple[dict[str, str], str], ...] = (
    ({}, "/home/a/.cache/huggingface/hub"),
    ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}, "/h/hub"),
    ({"HF_HOME": "~/h"}, "/home/a/h/hub"),
    ({"HF_HOME": "$XDG_CACHE_HOME/h", "XDG_CACHE_HOME": "/x"}, "/x/h/hub"),
    ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "${HF_HOME}/new", "HF_HOME": "/h"}, "/h/new"),
    ({"HF_HUB_CACHE": "~/new"}, "/home/a/new"),
    ({"HF_HOME": ""}, "hub"),
)


@pytest.mark.parametrize(("environ", "expected"), CACHES)
def test_the_hub_s_cache_is_found_by_its_rules(environ: dict[str, str], expected: str) -> None:
    """The variables in the order in which the hub's client looks at them."""
    assert Path(expected) == hub_cache({"HOME": "/home/a", **environ})


@pytest.mark.parametrize(("environ", "expected"), CACHES)
def test_the_hub_s_client_has_the_same_rules(
    environ: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The installed huggingface_hub, asked: should it change its mind, this fails."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/a", **environ}.items():
        monkeypatch.setenv(name, value)
    found: dict[str, object] = {
        "__name__": "constants",
        "__file__": constants.__file__,
        "__package__": "huggingface_hub",
    }
    exec(compile(Path(constants.__file__).read_text(), constants.__file__, "exec"), found)

    assert expected == found["HF_HUB_CACHE"]
