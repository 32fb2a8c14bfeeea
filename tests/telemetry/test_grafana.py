"""The dashboard: a Grafana 11 file, each of whose queries asks for what is exported, by labels that it has."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from telemetry_exported import exported

if TYPE_CHECKING:
    from collections.abc import Iterator

DASHBOARD: dict[str, Any] = json.loads((files("modelcache.telemetry") / "grafana.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [pytest.param(target["expr"], id=panel["title"]) for panel in PANELS for target in panel["targets"]]

SERIES = {
    name: {*metric.labels, *({"le"} if name.endswith("_bucket") else ())}
    for metric in exported()
    for name in metric.series
}
"""The labels of each series that is exported, by the name that queries use."""
TARGET = {"job", "instance"}
"""The labels that Prometheus adds."""

AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk", "bottomk", "quantile"}
OPERATORS = {"and", "or", "unless", "bool", "offset", "on", "ignoring", "group_left", "group_right"}
TOKEN = re.compile(r"""\s*(?:
    (?P<text>"(?:[^"\\]|\\.)*") | (?P<duration>\[[^\]]*\]) | (?P<number>\d+(?:\.\d+)?) | (?P<name>[a-zA-Z_:][\w:]*)
    | (?P<sign>=~|!~|!=|>=|<=|==|[-+*/%^(){},=<>])
)""", re.VERBOSE)  # fmt: skip


class Token(NamedTuple):
    kind: str
    text: str


class Use(NamedTuple):
    """A series in a query, with the labels that it has to have."""

    series: str
    labels: frozenset[str]


def tokens(query: str) -> list[Token]:
    found, at = [], 0
    while at < len(query.rstrip()):
        match = TOKEN.match(query, at)
        assert match and match.lastgroup, f"no PromQL from here on: {query[at:]}"
        found.append(Token(match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


class Reader:
    """Reads as much of PromQL as tells metrics from functions, and which labels a metric has to have."""

    def __init__(self, query: str) -> None:
        self._tokens = [*tokens(query), Token("end", "")]
        self._at = 0

    def read(self, grouped: frozenset[str] = frozenset()) -> Iterator[Use]:
        """Give what is used up to the parenthesis that closes this part; ``grouped``: the labels around it."""
        while not self._next_is(")") and self._tokens[self._at].kind != "end":
            token = self._take()
            if token.text == "(":
                yield from self._parenthesis(grouped)
            elif token.kind == "name" and token.text not in OPERATORS:
                yield from self._named(token.text, grouped)

    def _named(self, name: str, grouped: frozenset[str]) -> Iterator[Use]:
        if name in AGGREGATIONS:
            inside = self._labels() if self._next_is("by") else frozenset()
            self._expect("(")
            uses = list(self._parenthesis(inside))
            assert not self._next_is("by"), "write `sum by (label) (...)`"
            assert not inside or uses
            # What is aggregated keeps only the labels it is grouped by: nothing around it may ask for others.
            assert grouped <= inside, f"{sorted(grouped - inside)} are gone after {name}"
            yield from uses
        elif self._next_is("("):
            self._expect("(")
            yield from self._parenthesis(grouped | ({"le"} if name == "histogram_quantile" else set()))
        else:
            yield Use(name, grouped | (self._matchers() if self._next_is("{") else frozenset()))

    def _parenthesis(self, grouped: frozenset[str]) -> Iterator[Use]:
        yield from self.read(grouped)
        self._expect(")")

    def _labels(self) -> frozenset[str]:
        self._take()
        self._expect("(")
        found = set()
        while not self._next_is(")"):
            token = self._take()
            if token.kind == "name":
                found.add(token.text)
        self._expect(")")
        return frozenset(found)

    def _matchers(self) -> frozenset[str]:
        self._expect("{")
        found = set()
        while not self._next_is("}"):
            found.add(self._take().text)
            assert self._take().text in ("=", "!=", "=~", "!~")
            assert self._take().kind == "text"
            if self._next_is(","):
                self._expect(",")
        self._expect("}")
        return frozenset(found)

    def _next_is(self, text: str) -> bool:
        return self._tokens[self._at].text == text

    def _take(self) -> Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, text: str) -> None:
        token = self._take()
        assert token.text == text, f"{text!r} expected, not {token.text!r}"


def uses(query: str) -> list[Use]:
    reader = Reader(query)
    found = list(reader.read())
    assert reader._tokens[reader._at].kind == "end", "a parenthesis too many"
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_asks_for_what_is_exported(query: str) -> None:
    """Every series exists, and has every label by which it is chosen or grouped; each is that of the chosen target."""
    found = uses(query)
    assert found
    for series, labels in found:
        assert series in SERIES
        assert labels - TARGET <= SERIES[series]
        assert labels >= TARGET, "the choice of job and instance is left out"


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_asked_for_their_rate(query: str) -> None:
    """The bare value of a counter says when the process was started, and no more."""
    for series, _ in uses(query):
        counts = series.endswith(("_total", "_bucket", "_sum", "_count"))
        rated = re.search(rf"(rate|increase)\({series}\{{[^}}]*\}}\[[^\]]+\]\)", query) is not None
        assert counts == rated, series


@pytest.mark.parametrize("panel", [pytest.param(panel, id=panel["title"]) for panel in PANELS])
def test_legends_show_labels_that_are_left(panel: dict[str, Any]) -> None:
    """A legend of a label that the query has lost is empty."""
    for target in panel["targets"]:
        kept = {
            label for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for label in re.split(r",\s*", group)
        }
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept


def test_the_reader_of_queries_finds_mistakes() -> None:
    """It tells functions, groupings and matchers from metrics, so that none of them hides a wrong name."""
    query = 'histogram_quantile(0.9, sum by (le, worker) (rate(a_bucket{x=~"b(c{",y!="d"}[5m]))) / (1 + b) > 0'
    assert uses(query) == [Use("a_bucket", frozenset({"le", "worker", "x", "y"})), Use("b", frozenset())]
    for broken in ("sum(a", "sum(a))", "a{b}", "sum by (le) (a) $", "histogram_quantile(0.9, sum by (x) (a))"):
        with pytest.raises(AssertionError):
            uses(broken)


def test_it_is_a_dashboard_of_grafana_11() -> None:
    """Importable as it is: no id of somebody's database, the data source a choice, panels that do not overlap."""
    assert DASHBOARD["schemaVersion"] == 39 and "id" not in DASHBOARD and "__inputs" not in DASHBOARD
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert all(variables[name]["datasource"] == chosen for name in TARGET)
    for panel in PANELS:
        assert panel["datasource"] == chosen and all(target["datasource"] == chosen for target in panel["targets"])
        assert panel["type"] in ("timeseries", "stat", "bargauge")
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken = [cell for panel in everything for cell in cells(panel["gridPos"])]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24


def cells(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    return ((place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"]))


def test_variables_are_filled_from_what_is_exported() -> None:
    """And each variable that queries use is there."""
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    for name in TARGET:
        metric = re.match(r"label_values\((\w+)[{,]", variables[name]["definition"])
        assert metric and metric[1] in SERIES
        assert variables[name]["query"]["query"] == variables[name]["definition"]
    used = set(re.findall(r"\$\{?(?!__)(\w+)", json.dumps(DASHBOARD)))
    assert used == variables.keys()


def test_the_questions_of_an_operator_have_a_panel() -> None:
    """What the issue asks for, by title."""
    assert {panel["title"] for panel in PANELS} >= {
        "Request rate", "Hit ratio", "Cold latency", "Warm latency per worker", "Bytes against the budget",
        "Evictions by cause", "Loads and failures", "Resident models", "Queue depth", "Restarts and deaths",
        "Most used models",
    }  # fmt: skip
