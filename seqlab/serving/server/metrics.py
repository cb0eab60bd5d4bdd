"""Counters and histograms in Prometheus' text format (version 0.0.4)."""

import bisect
import collections
from collections.abc import Mapping

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Seconds, counted up to fixed bounds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(_BOUNDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """The histogram as Prometheus reads it."""
        total, made = 0, [f"# TYPE {name} histogram"]
        for bound, count in zip((*map(str, _BOUNDS), "+Inf"), self._counts, strict=True):
            total += count
            made.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*made, f"{name}_sum {self._sum}", f"{name}_count {total}"]


class Metrics:
    """Counts and times of a server."""

    def __init__(self) -> None:
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()
        self.answers: collections.Counter[int] = collections.Counter()  # by HTTP status

    def text(self, stats: Mapping[str, float]) -> str:
        """All metrics; `stats` are those of the batcher."""
        lines = ["# TYPE seqlab_responses_total counter"]
        lines += [
            f'seqlab_responses_total{{status="{code}"}} {n}' for code, n in sorted(self.answers.items())
        ]
        for name, value in stats.items():
            gauge = name in ("running", "waiting", "state_bytes", "prefix_bytes")
            title = f"seqlab_{name}" if gauge else f"seqlab_{name}_total"
            lines += [f"# TYPE {title} {'gauge' if gauge else 'counter'}", f"{title} {value}"]
        for name in ("first", "between", "whole"):
            title = {"first": "time_to_first_token", "between": "time_between_tokens", "whole": "request"}[
                name
            ]
            lines += getattr(self, name).lines(f"seqlab_{title}_seconds")
        return "\n".join(lines) + "\n"
