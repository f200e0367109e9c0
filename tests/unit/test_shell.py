"""Shell text is read as bash reads it; what only a running shell knows is a hole."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_serve.core.shell import ShellError, commands, holes, interpolated, readable

HOME = {"HOME": "/home/u"}


def words(text: str) -> list[tuple[str, ...]]:
    """The words of each command."""
    return [command.words for command in commands(text, HOME)]


def in_bash(script: str) -> list[str]:
    """The words that bash gives the last command `show` of a script."""
    text = f"show() {{ printf '\\1'; [ $# = 0 ] || printf '%s\\0' \"$@\"; }}\n{script}"
    done = subprocess.run(["bash", "-c", text], env=HOME, capture_output=True, text=True, check=True)
    return done.stdout.rpartition("\1")[2].split("\0")[:-1]


def shown(script: str) -> list[str]:
    """The words that we give the last command `show` of a script."""
    return [list(found[1:]) for found in words(script) if found[0] == "show"][-1]


@pytest.mark.parametrize(
    "script",
    [
        "show a 'b c' \"d e\" f\\ g h'i'\"j\"k",
        "show a \\\n  b # no 'c\nshow d",
        'X=1; show $X "$X" \'$X\' ${X}2 "$X$X"',
        'X="a  b"; show $X "$X" p$X"q"',
        "show ${X:-d} ${X-e} \"${X:-f g}\" ${Y:='h'} $Y",
        'X=; show a$X "" "$X" ${X:-d} ${X-e} ${X:+f} ${X+g}',
        'A=(a "b c"); A+=(d); show "${A[@]}" x"${A[@]}"y "${A[*]}" ${A[@]}',
        'A=(); show a "${A[@]}" b ${A[@]} "x${A[@]}"',
        'show a "$@" b $* "pre$@"',
        "A=x; A+=y; export B=$A; show $A $B",
        "show ~/a '~'/b c~ ~",
        'show a | cat >/dev/null; show \'{"a": [1, "$x;c"]}\'',
        "show a > /dev/null 2>&1; show b 2>/dev/null",
        "true && show '#a' a#b #c",
        "cat >/dev/null <<'END'\nshow no'\nEND\nshow yes",
        'if true; then X=1; fi; { show "$X"; }',
        'show "a\\"b\\$c\\\\d\\e"',
        'show "${X:-"a b"}" "${X:-c}"d',
        "show --x=\"a b\" --y='c d'e",
        "X='*'; show \"$X\" 5 8>/dev/null",
        "unset HOME; export X=1 Y='2 3'; declare -x Z=4; show $X \"$Y\" $Z",
    ],
)
def test_words_are_those_that_bash_makes(script: str) -> None:
    """Quotes, variables, arrays, redirections and here-documents, against the real thing."""
    assert in_bash(script) == shown(script)


PLAIN = st.sampled_from(
    ["a", "b1", "--x", "=", "$X", "${X}", "${U:-d e}", "'q r'", '"s $X"', '"${A[@]}"', "\\ ", '""', "{", "}", ",", "-"]
)
WORD = st.lists(PLAIN, min_size=1, max_size=4).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORD, max_size=4), st.sampled_from(["", "v", "v w"]))
def test_any_mix_of_pieces_becomes_what_bash_makes_of_it(pieces: list[str], value: str) -> None:
    """Pieces side by side, quoted and not, set and unset."""
    assume(not any("{" in piece and "," in piece and "}" in piece for piece in pieces))  # brace expansion is not read
    script = f"X={shlex.quote(value)}; A=(1 '2 3'); show end {' '.join(pieces)}"

    assume(not any(map(holes, shown(script))))

    assert in_bash(script) == shown(script)


@given(st.lists(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=8), min_size=1))
def test_quoted_words_come_back(given_words: list[str]) -> None:
    """What shlex quotes is read as one word each."""
    text = shlex.join(["cmd", *given_words])

    assert words(text) == [("cmd", *given_words)]


def test_commands_come_with_environment_and_line() -> None:
    """Exported before, or in front; a variable that is only set is no environment."""
    found = commands("export A=1\nB=2\nset -a\nC=3\nset +a\nD=4 run it\nother", {})

    assert [(command.words, dict(command.env), command.line) for command in found] == [
        (("run", "it"), {"A": "1", "C": "3", "D": "4"}, 6),
        (("other",), {"A": "1", "C": "3"}, 7),
    ]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("$1", ("$1",)),
        ("a$(date +%F)b", ("$(date +%F)",)),
        ('"${X}y$Z"', ("${X}", "$Z")),
        ("`id`", ("`id`",)),
        ("${X%.*}", ("${X%.*}",)),
    ],
)
def test_what_is_not_known_is_a_hole_with_its_name(word: str, expected: tuple[str, ...]) -> None:
    """A hole is never taken for an empty word, nor for its own name."""
    ((_, found),) = words(f"cmd {word}")

    assert expected == holes(found)
    assert readable(found) == word.strip('"')
    assert holes("$1") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb 'c\nd", "line 2: a closing ' is missing"),
        ('x "y', 'line 1: a closing " is missing'),
        ("x $(y", "line 1: a closing ) is missing"),
        ("x ${y", "line 1: a closing } is missing"),
    ],
)
def test_an_unclosed_quotation_names_its_line(text: str, message: str) -> None:
    """Half a script is no script."""
    with pytest.raises(ShellError, match="line") as caught:
        commands(text, {})

    assert message == str(caught.value)


@given(st.text(st.sampled_from("ab =$'\"\\`(){}[]@*:-+<>&|;#\n~!1"), max_size=40))
def test_no_text_is_more_than_read_or_refused(text: str) -> None:
    """Whatever is fed, an answer comes: no crash, no endless loop."""
    try:
        found = commands(text, HOME)
    except ShellError:
        return
    assert all(command.words for command in found)


def test_compose_fills_in_its_variables_and_keeps_dollars() -> None:
    """`$$` is a dollar, a default is a default, and the rest is a hole."""
    assert interpolated("a$$b ${X:-d} 'e'", {}) == "a$b d 'e'"
    assert holes(interpolated("${TOKEN}", {})) == ("${TOKEN}",)
