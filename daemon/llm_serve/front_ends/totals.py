"""The metrics of several front ends as those of one instance.

Counters and histograms are added up, those of front ends that have ended included, so that none goes backwards. A
gauge of vLLM's tells of the engine and not of a client, so it is taken whole from whom the engine has told last; of
ours, what waits at the gates is added up, and every other one is the supervisor's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from llm_serve.metrics import Series, series_of

_ADDED = frozenset({"counter", "histogram"})
_ADDED_GAUGES = frozenset({"llm_serve_requests_held"})
_OURS_AND_VLLM = ("llm_serve_", "vllm:")


def of_this_process(registry: Collector) -> tuple[Metric, ...]:
    """What a front end reports: what it counts, and the engine's gauges."""
    return tuple(family for family in registry.collect() if family.name.startswith(_OURS_AND_VLLM))


class Totals(Collector):
    """The supervisor's own registry with the others' reports added, which are known by the place of who sent them.

    `newest` says whom the engine has told last; place 0 is the supervisor's own process.
    """

    def __init__(self, own: Collector, newest: Callable[[], int]) -> None:
        self._own, self._newest = own, newest
        self._reports: dict[int, tuple[Metric, ...]] = {}
        self._ended: tuple[Metric, ...] = ()

    def report(self, place: int, families: Iterable[Metric]) -> None:
        """What the front end there has counted so far."""
        self._reports[place] = tuple(families)

    def ended(self, place: int) -> None:
        """The front end there is gone; what it has reported last stays counted."""
        last = self._reports.pop(place, ())
        counted = {family.name: copy.copy(family) for family in self._ended}
        for family in last:
            if family.type in _ADDED:
                _merge(counted, family, _summed)
        self._ended = tuple(counted.values())

    def collect(self) -> Iterator[Metric]:
        """The families for one scrape."""
        families = {family.name: family for family in self._own.collect()}
        newest = self._newest()
        for place, report in [*self._reports.items(), (None, self._ended)]:
            for family in report:
                if family.type in _ADDED or family.name in _ADDED_GAUGES:
                    _merge(families, family, _summed)
                elif place == newest and family.name.startswith("vllm:"):
                    _merge(families, family, _replaced)
        yield from families.values()


def _merge(
    families: dict[str, Metric], other: Metric, merged: Callable[[Sequence[Sample], Sequence[Sample]], list[Sample]]
) -> None:
    """Put another process's family to ours of the same name; where there is none it is taken as it is."""
    into = copy.copy(families.get(other.name) or other)
    into.samples = merged(families[other.name].samples if other.name in families else (), other.samples)
    families[other.name] = into


def _summed(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[Sample]:
    sums: dict[Series, Sample] = {series_of(sample): sample for sample in ours}
    for sample in theirs:
        known = sums.get(series_of(sample))
        sums[series_of(sample)] = sample if known is None else known._replace(value=known.value + sample.value)
    return list(sums.values())


def _replaced(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[Sample]:
    """Not more series than ours: what a client knows of the engine beside its steps, the first one knows best."""
    newer = {series_of(sample): sample for sample in theirs}
    return [newer.get(series_of(sample), sample) for sample in ours]
