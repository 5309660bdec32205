"""What clients get through the socket: latencies and rates at a level of load, from its requests' traces.

accepted   from sending a request to its `accepted`
TTFT       time to first token: from sending to the first delta
ITL        inter-token latency: between two deltas of a request that follow each other; a delta is a token,
           unless tokens waited for a whole character or the client lagged (`tokens_per_delta` tells)
TPOT       time per output token of a request: last delta − first delta, over the tokens after the first delta
e2e        from sending to the final message
tokens/s   generated tokens of all requests, over the time from the first sending to the last final message
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.bench.load import Trace
from edgellm.bench.report import Column
from edgellm.bench.statistics import goodput, summarize

LATENCIES = ("accepted_ms", "ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
PERCENTILES = ("p50", "p90", "p99")


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must keep to count as good; None is no objective.

    Attributes:
        ttft_ms: time to first token.
        itl_ms: the request's own mean time per output token, as in vLLM's goodput.
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def met(self, trace: Trace) -> bool:
        """Whether a request was answered in full and in time."""
        if not trace.ok:
            return False
        latency = latencies(trace)
        return all(
            limit is None or all(value <= limit for value in latency[name])
            for name, limit in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.itl_ms))
        )


def latencies(trace: Trace) -> dict[str, list[float]]:
    """Milliseconds by name; empty where there is nothing to measure."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    if trace.accepted is not None:
        found["accepted_ms"] = [1000 * (trace.accepted - trace.sent)]
    if trace.ended is not None:
        found["e2e_ms"] = [1000 * (trace.ended - trace.sent)]
    if trace.deltas:
        times = [arrived for arrived, _ in trace.deltas]
        found["ttft_ms"] = [1000 * (times[0] - trace.sent)]
        found["itl_ms"] = [1000 * (later - earlier) for earlier, later in itertools.pairwise(times)]
        after_first = sum(tokens for _, tokens in trace.deltas[1:])
        if after_first:
            found["tpot_ms"] = [1000 * (times[-1] - times[0]) / after_first]
    return found


def row_of(label: dict[str, Any], traces: Sequence[Trace], objectives: Objectives) -> dict[str, Any]:
    """The report's row for one level of load.

    Args:
        label: what the level was, such as its concurrency.
        traces: its requests, at least one.
        objectives: for goodput.
    """
    good = [trace for trace in traces if trace.ok]
    seconds = max(trace.ended or trace.sent for trace in traces) - min(trace.sent for trace in traces)
    generated = sum(trace.completion_tokens for trace in good)
    deltas = sum(len(trace.deltas) for trace in good)
    row: dict[str, Any] = {
        **label,
        "requests": len(traces),
        "errors": len(traces) - len(good),
        "seconds": seconds,
        "requests_per_s": _per(len(good), seconds),
        "prompt_tokens_per_s": _per(sum(trace.prompt_tokens for trace in good), seconds),
        "tokens_per_s": _per(generated, seconds),
        "goodput_per_s": goodput([objectives.met(trace) for trace in traces], seconds),
        "cached_tokens": sum(trace.cached_tokens for trace in good),
        "tokens_per_delta": _per(sum(tokens for trace in good for _, tokens in trace.deltas), deltas),
    }
    found = [latencies(trace) for trace in good]
    for name in LATENCIES:
        summary = summarize([value for latency in found for value in latency[name]])
        row[f"{name}_mean"] = summary.mean
        for percentile in PERCENTILES:
            row[f"{name}_{percentile}"] = getattr(summary, percentile)
        row[f"{name}_max"] = summary.most
    return row


def columns(label: Column, objectives: Objectives) -> list[Column]:
    """What people see of such rows; `label` is the first column."""
    shown = [
        label,
        Column("requests", ("requests",)),
        Column("errors", ("errors",)),
        Column("tok/s", ("tokens_per_s",), "{:.1f}"),
        Column("req/s", ("requests_per_s",), "{:.2f}"),
    ]
    if objectives != Objectives():
        shown.append(Column("good/s", ("goodput_per_s",), "{:.2f}"))
    for name, digits in (("accepted_ms", 2), ("ttft_ms", 1), ("itl_ms", 2), ("e2e_ms", 0)):
        title = {"accepted_ms": "accepted ms", "ttft_ms": "TTFT ms", "itl_ms": "ITL ms", "e2e_ms": "e2e ms"}
        fields = tuple(f"{name}_{percentile}" for percentile in PERCENTILES)
        shown.append(Column(title[name], fields, " / ".join([f"{{:.{digits}f}}"] * 3)))
    return shown


def errors_of(traces: Sequence[Trace]) -> dict[str, int]:
    """How many requests ended with which code."""
    return dict(collections.Counter(trace.error for trace in traces if trace.error is not None))


def sample_of(trace: Trace) -> dict[str, Any]:
    """A request's own figures, for JSON."""
    latency = latencies(trace)
    return {
        "error": trace.error,
        "prompt_tokens": trace.prompt_tokens,
        "cached_tokens": trace.cached_tokens,
        "completion_tokens": trace.completion_tokens,
        **{name: latency[name][0] if latency[name] else None for name in LATENCIES if name != "itl_ms"},
        "itl_ms": latency["itl_ms"],
    }


def steady_decode_rate(traces: Sequence[Trace]) -> float:
    """Tokens per second while all requests were generating, and nothing else: NaN if they never all were.

    From the moment when the last of them got its first token, to when the first of them got its last.
    """
    if not traces or not all(trace.ok and trace.deltas for trace in traces):
        return float("nan")
    start = max(trace.deltas[0][0] for trace in traces)
    end = min(trace.deltas[-1][0] for trace in traces)
    if end <= start:
        return float("nan")
    arrived = np.array([(when, tokens) for trace in traces for when, tokens in trace.deltas])
    inside = (arrived[:, 0] > start) & (arrived[:, 0] <= end)
    return float(arrived[inside, 1].sum() / (end - start))


def _per(count: float, by: float) -> float:
    return count / by if by > 0 else float("nan")
