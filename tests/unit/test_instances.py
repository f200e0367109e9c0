"""Finding and reading instance files and API keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_serve.core.errors import ConfigError
from llm_serve.core.settings import ServerSettings, Settings
from llm_serve.host.instances import read_api_keys, read_instance
from llm_serve.host.names import instance_names, instance_path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A configuration directory with two instances."""
    for name in ("qwen7b", "demo"):
        (tmp_path / f"{name}.toml").write_text(f'model = "{name}-model"\n')
    (tmp_path / "notes.txt").write_text("not an instance")
    return tmp_path


def refusal(target: str, directory: Path) -> str:
    """Return the message of a refused target."""
    with pytest.raises(ConfigError) as caught:
        read_instance(target, directory)
    return str(caught.value)


def settings_with_keys(path: Path | None) -> Settings:
    """Return settings whose keys are in a file."""
    server = ServerSettings(api_keys=None if path is None else str(path))
    return Settings(name="a", source="a.toml", model="m", server=server)


def key_refusal(path: Path) -> str:
    """Return the message of a refused file of keys."""
    with pytest.raises(ConfigError) as caught:
        read_api_keys(settings_with_keys(path), {})
    return str(caught.value)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A well-kept file of two keys."""
    path = tmp_path / "a.keys"
    path.write_text("# clients\n\nfirst-key-0001\n  second-key-0002 \nfirst-key-0001\n")
    path.chmod(0o640)
    return path


def test_a_name_is_a_file_in_the_directory(directory: Path) -> None:
    """NAME is DIRECTORY/NAME.toml, and the instance bears the name."""
    settings, text = read_instance("qwen7b", directory)

    assert (settings.name, settings.model) == ("qwen7b", "qwen7b-model")
    assert str(directory / "qwen7b.toml") == settings.source
    assert text == 'model = "qwen7b-model"\n'


@pytest.mark.parametrize("target", ["./x", "a/b", "x.toml", "/abs"])
def test_a_slash_or_toml_makes_a_file_of_a_target(target: str, directory: Path) -> None:
    """What looks like a path is one, whether it exists or not."""
    assert Path(target) == instance_path(target, directory)


def test_a_file_in_the_working_directory_is_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing file wins over an instance's name."""
    monkeypatch.chdir(directory)

    assert Path("notes.txt") == instance_path("notes.txt", directory)


@pytest.mark.parametrize("target", ["", "a b", "-x", "../x\n", ".."])
def test_what_cannot_be_a_name_is_refused(target: str, directory: Path) -> None:
    """A name that systemd or a shell would read otherwise is never looked for."""
    assert refusal(target, directory)


def test_an_absent_instance_names_the_nearest_and_all_there_are(directory: Path) -> None:
    """A typing error in a name is answered with the names."""
    message = refusal("qwen7", directory)

    assert "does not exist. Did you mean qwen7b? " in message
    assert "demo, qwen7b" in message


def test_the_first_instance_of_a_machine_is_told_where_to_go(tmp_path: Path) -> None:
    """With no instance at all the message says so."""
    assert f"There is no instance in {tmp_path} yet" in refusal("qwen7b", tmp_path)


def test_only_instance_files_count_as_instances(directory: Path) -> None:
    """Names are those of the TOML files, in order."""
    assert instance_names(directory) == ("demo", "qwen7b")


def test_a_folder_is_not_a_file(directory: Path) -> None:
    """A folder's name is refused as such."""
    assert "is a folder" in refusal(str(directory), directory)


def test_a_file_in_another_encoding_is_refused_at_its_line(directory: Path) -> None:
    """A byte that is not UTF-8 is located."""
    path = directory / "latin.toml"
    path.write_bytes(b'model = "m"\n# caf\xe9\n')

    assert f"{path}:2: is not UTF-8. Save it as UTF-8" == refusal("latin", directory)


def test_an_unreadable_file_says_why(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing permission is told from a missing file."""

    def denied(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)

    assert "cannot be read: Permission denied" in refusal("demo", directory)


def test_keys_are_one_a_line_without_comments_and_doubles(keys: Path) -> None:
    """Blank lines, comments, blanks around a key and repetitions do not count."""
    assert read_api_keys(settings_with_keys(keys), {}) == ("first-key-0001", "second-key-0002")


def test_without_a_file_the_credential_of_systemd_is_read(tmp_path: Path) -> None:
    """Keys that systemd hands over need no option."""
    (tmp_path / "api-keys").write_text("credential-key\n")

    assert read_api_keys(settings_with_keys(None), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == ("credential-key",)


def test_the_file_that_is_named_wins_over_the_credential(keys: Path, tmp_path: Path) -> None:
    """An explicit option is never overruled by what lies around."""
    (tmp_path / "api-keys").write_text("credential-key\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    assert read_api_keys(settings_with_keys(keys), environ)[0] == "first-key-0001"


def test_no_file_and_no_credential_are_no_keys(tmp_path: Path) -> None:
    """Having no keys is a choice, judged elsewhere."""
    assert read_api_keys(settings_with_keys(None), {}) == ()
    assert read_api_keys(settings_with_keys(None), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == ()


def test_an_absent_file_of_keys_is_refused(tmp_path: Path) -> None:
    """A server that was to have keys does not come up without."""
    assert "server.api_keys" in key_refusal(tmp_path / "none.keys")


def test_an_empty_file_of_keys_is_refused(keys: Path) -> None:
    """Comments are no keys."""
    keys.write_text("# none yet\n")

    assert "has no key in it" in key_refusal(keys)


def test_a_file_of_keys_that_everyone_reads_is_refused(keys: Path) -> None:
    """Keys that are open to every user are no secret, and the remedy is named."""
    keys.chmod(0o644)

    assert f"chmod o-r {keys}" in key_refusal(keys)


@pytest.mark.parametrize("bad", ["sh0rt", "with blank inside", "schlüssel-lang", "\x00binary-binary"])
def test_a_bad_key_is_refused_by_its_line_and_never_shown(keys: Path, bad: str) -> None:
    """The message leads to the key without giving it away."""
    keys.write_text(f"good-key-0001\n{bad}\n")

    message = key_refusal(keys)

    assert f"{keys}:2: " in message
    assert bad not in message
    assert "good-key" not in message


def test_keys_in_another_encoding_are_refused_without_their_bytes(keys: Path) -> None:
    """Neither the message nor its cause holds the file's content."""
    keys.write_bytes(b"secret-\xff-key\n")

    with pytest.raises(ConfigError) as caught:
        read_api_keys(settings_with_keys(keys), {})

    assert "is not UTF-8" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
