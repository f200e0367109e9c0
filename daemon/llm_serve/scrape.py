"""What a server's /metrics say, of the few families that matter here, as values."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from llm_serve.core.bottleneck import Observation
from llm_serve.core.vitals import Look

_Join = Callable[[Sequence[float]], float]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# Field: the series it is read from, and how those of several engines become one value.
_SEEN: Mapping[str, tuple[str, _Join]] = {
    "running": ("vllm:num_requests_running", sum),
    "waiting": ("vllm:num_requests_waiting", sum),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", max),
    "preemptions": ("vllm:num_preemptions_total", sum),
    "held": ("llm_serve_requests_held", sum),
    "max_num_seqs": ("llm_serve_plan_max_num_seqs", sum),
    "gpu_utilization": ("llm_serve_gpu_utilization_ratio", _mean),
    "front_end_cpu_s": ("process_cpu_seconds_total", sum),
}
_COUNTED: Mapping[str, tuple[str, _Join]] = {
    "generated": ("vllm:generation_tokens_total", sum),
    "prompt": ("vllm:prompt_tokens_total", sum),
    "answered": ("vllm:request_success_total", sum),
    "cache_queries": ("vllm:prefix_cache_queries_total", sum),
    "cache_hits": ("vllm:prefix_cache_hits_total", sum),
}
_FIRST_TOKEN = "vllm:time_to_first_token_seconds_bucket"  # noqa: S105 - a token of text


def _lines(*names: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:{'|'.join(map(re.escape, names))})[{{ ].*$", re.MULTILINE)


# Only these few lines of a hundred families are parsed: it happens beside a measurement, or once a second.
_OF_SEEN = _lines(*(name for name, _ in _SEEN.values()))
_OF_LOOK = _lines(*(name for name, _ in {**_SEEN, **_COUNTED}.values()), _FIRST_TOKEN)


def observation(text: str, at_s: float) -> Observation | None:
    """An observation from Prometheus's text format; None when there is nothing in it that matters here."""
    told = _told(_samples(text, _OF_SEEN), _SEEN)
    return Observation(at_s, **told) if told else None


def look(text: str, at_s: float) -> Look | None:
    """All that is told of a load; None when nothing is."""
    found = _samples(text, _OF_LOOK)
    told = _told(found, _SEEN)
    first_token: dict[float, float] = {}
    for sample in found.get(_FIRST_TOKEN, ()):
        bound = float(sample.labels["le"])
        first_token[bound] = first_token.get(bound, 0.0) + sample.value
    return Look(Observation(at_s, **told), **_told(found, _COUNTED), first_token=first_token) if told else None


def _samples(text: str, lines: re.Pattern[str]) -> dict[str, list[Sample]]:
    """The samples in these lines by their names; none where they are no metrics."""
    found: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families("\n".join(lines.findall(text)) + "\n"):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(sample)
    except ValueError:
        return {}
    return found


def _told(found: Mapping[str, Sequence[Sample]], fields: Mapping[str, tuple[str, _Join]]) -> dict[str, Any]:
    return {
        field: join([sample.value for sample in found[name]]) for field, (name, join) in fields.items() if name in found
    }
