"""The Grafana dashboard: made by its script, in Grafana's form, and asking for what there is."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_serve.core.states import State
from tests.promql import DASHBOARD, dashboard_expressions, dashboard_script

BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
UNITS = {"short", "s", "percentunit", "reqps", "celsius", "watt", "bytes", "suffix: tok/s"}
"""Grafana's own names (packages/grafana-data/src/valueFormats/categories.ts); `suffix:` makes one up."""
KINDS = {"row", "timeseries", "state-timeline"}


def test_the_file_is_what_the_script_makes() -> None:
    """Whoever changes one without the other is told; run packaging/grafana/make-dashboard."""
    assert DASHBOARD.read_text() == dashboard_script().text()


def test_the_script_needs_nothing_but_python(tmp_path: Path) -> None:
    """It runs outside of the environment, and writes where it lies."""
    script = tmp_path / "make-dashboard"
    script.write_text((DASHBOARD.parent / "make-dashboard").read_text())

    subprocess.run([sys.executable, "-I", "-S", str(script)], check=True, stdout=subprocess.DEVNULL)

    assert DASHBOARD.read_bytes() == (tmp_path / "llm-serve.json").read_bytes()


def test_panels_are_told_apart() -> None:
    """By number and by title; each says what it shows."""
    numbers, titles = ([panel[what] for panel in PANELS] for what in ("id", "title"))

    assert (len(PANELS), len(PANELS)) == (len(set(numbers)), len(set(titles)))
    assert all(panel["type"] in KINDS for panel in PANELS)
    assert all(panel["description"].endswith(".") for panel in GRAPHS)


def test_panels_lie_side_by_side() -> None:
    """Within the width, none on another, and nothing above its row's title."""
    for panel in PANELS:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, panel["title"]
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in PANELS
        for x, y in itertools.product(range(panel["gridPos"]["w"]), range(panel["gridPos"]["h"]))
    ]
    assert len(cells) == len(set(cells))
    assert [panel["gridPos"]["y"] for panel in PANELS] == sorted(panel["gridPos"]["y"] for panel in PANELS)


def test_every_question_goes_to_the_chosen_source_and_instances() -> None:
    """Nothing is bound to the machine on which the dashboard was made."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    names = [each["name"] for each in BOARD["templating"]["list"]]
    assert ["datasource", "host", "instance"] == names
    for panel in GRAPHS:
        assert source == panel["datasource"]
        references = [ask["refId"] for ask in panel["targets"]]
        assert len(references) == len(set(references))
        for ask in panel["targets"]:
            assert source == ask["datasource"]
            assert 'host=~"$host", instance=~"$instance"' in ask["expr"]
            assert set(re.findall(r"\$\w+", ask["expr"])) <= {"$host", "$instance", "$__rate_interval"}


def test_units_are_known_to_grafana() -> None:
    """A word that it does not know is shown as it is, behind every number."""
    assert UNITS == {panel["fieldConfig"]["defaults"]["unit"] for panel in GRAPHS}


def test_every_state_has_a_name_and_a_colour() -> None:
    """The timeline shows numbers as words: all that a machine can be in, each with its own."""
    timeline = next(panel for panel in PANELS if panel["type"] == "state-timeline")
    names = timeline["fieldConfig"]["defaults"]["mappings"][0]["options"]
    asked = re.findall(r'state="(\w+)"\} \* (\d+)', timeline["targets"][0]["expr"])

    assert {state.value for state in State} == {each["text"] for each in names.values()}
    assert {(each["text"], number) for number, each in names.items()} == set(asked)
    assert len(names) == len({each["color"] for each in names.values()})


@pytest.mark.prometheus
def test_promtool_parses_every_expression(tmp_path: Path) -> None:
    """Each as a recording rule of its own, with Grafana's variables filled in; a broken one is refused."""
    expressions = dashboard_expressions()
    assert len(expressions) >= 40

    def check(asked: list[str]) -> tuple[int, str]:
        rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(asked)]
        (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
        command = ["promtool", "check", "rules", str(tmp_path / "rules.yml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    status, said = check(list(expressions.values()))
    assert (0, True) == (status, f"{len(expressions)} rules found" in said), said
    assert 0 != check([*expressions.values(), "sum by (host (up)"])[0]
