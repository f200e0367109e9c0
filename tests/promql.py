"""What the shipped rules and the dashboard ask Prometheus for, and whether a daemon really exports it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.samples import Sample

PACKAGING = Path(__file__).resolve().parents[1] / "packaging"
PROMETHEUS = PACKAGING / "prometheus"
RULES = (PROMETHEUS / "llm-serve.recording.yml", PROMETHEUS / "llm-serve.alerts.yml")
DASHBOARD = PACKAGING / "grafana/llm-serve.json"
VARIABLES = {"$__rate_interval": "5m", "$host": ".*", "$instance": ".*"}
"""Grafana's, with what it could put in their place."""
OF_THE_TARGET = frozenset({"job", "host", "instance"})
"""Labels that Prometheus adds to what it scrapes."""
FROM_PROMETHEUS = frozenset({"up"})
_LABEL_VALUES = re.compile(r"label_values\((.+), (\w+)\)")


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric with conditions on its labels, as (label, operator, value)."""

    metric: str
    conditions: tuple[tuple[str, str, str], ...]

    def matches(self, sample: Sample) -> bool:
        """True for a sample that it selects, whatever the labels of the target."""
        return sample.name == self.metric and all(
            _holds(operator, sample.labels.get(label, ""), value)
            for label, operator, value in self.conditions
            if label not in OF_THE_TARGET
        )


def _holds(operator: str, found: str, value: str) -> bool:
    is_equal = bool(re.fullmatch(value, found)) if operator.endswith("~") else value == found
    return is_equal != operator.startswith("!")


def rules() -> list[dict[str, Any]]:
    """Every rule of the shipped files, as it stands there."""
    groups = (group for file in RULES for group in yaml.safe_load(file.read_text())["groups"])
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """The alerts by their names."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def records() -> dict[str, str]:
    """The expressions of the recording rules by the names of what they make."""
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def dashboard_script() -> Any:
    """packaging/grafana/make-dashboard as a module."""
    name, path = "make_dashboard", str(PACKAGING / "grafana/make-dashboard")
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def dashboard_expressions() -> dict[str, str]:
    """Everything that the dashboard asks, by where it stands, with its variables filled in."""
    board = json.loads(DASHBOARD.read_text())
    found = {
        f"{panel['title']} {ask['refId']}": ask["expr"] for panel in board["panels"] for ask in panel.get("targets", ())
    }
    found |= {f"annotation {each['name']}": each["expr"] for each in board["annotations"]["list"]}
    for each in board["templating"]["list"]:
        if each["type"] == "query":
            asked = _LABEL_VALUES.fullmatch(each["definition"])
            assert asked, each["definition"]
            found[f"variable {each['name']}"] = asked[1]
    return {place: _filled_in(expression) for place, expression in found.items()}


def _filled_in(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def selectors(expression: str) -> Iterator[Selector]:
    """Every metric that an expression names."""
    found: list[Any] = []
    _collect(promql_parser.parse(expression), found)
    for each in found:
        assert each.name, expression
        conditions = tuple((one.name, _operator(one.op), one.value) for one in each.matchers.matchers)
        yield Selector(each.name, conditions)


def _collect(expression: Any, found: list[Any]) -> None:
    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.SubqueryExpr):
            _collect(node.expr, found)  # walk() does not go into it

    promql_parser.walk(expression, visit)


def _operator(op: Any) -> str:
    known = promql_parser.MatchOp
    return next(
        text
        for each, text in ((known.Equal, "="), (known.NotEqual, "!="), (known.Re, "=~"), (known.NotRe, "!~"))
        if op == each
    )


def asked_of_a_daemon() -> dict[Selector, str]:
    """Every selector of rules and dashboard that a daemon must answer, with one of the expressions it stands in."""
    expressions = [rule["expr"] for rule in rules()] + list(dashboard_expressions().values())
    own = FROM_PROMETHEUS | records().keys()
    return {
        selector: expression
        for expression in expressions
        for selector in selectors(expression)
        if selector.metric not in own
    }


def unanswered(asked: Iterable[Selector], samples: Iterable[Sample]) -> list[Selector]:
    """Those that select nothing."""
    known = list(samples)
    return [selector for selector in asked if not any(map(selector.matches, known))]
