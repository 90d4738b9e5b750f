"""The front: the records that no other record beats in both parameters and word error rate."""

from collections.abc import Iterable, Sequence

from prunesearch.record import RunRecord


def non_dominated(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point dominates, both coordinates minimised; sorted by point, then index.

    A point dominates another that it nowhere exceeds and somewhere undercuts; so equal points all stay. O(n log n): in
    sorted order, the last point kept has the lowest second coordinate so far, and only it needs to be looked at.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def dev_wer(record: RunRecord) -> float:
    """A complete record's dev WER (a fraction). Raises ValueError for a record without one."""
    if record.dev is None:
        raise ValueError(f"{record.candidate.key} is {record.state} and has no dev result; only complete records compete")
    return record.dev.errors.wer


def pareto_front(records: Iterable[RunRecord], objective: str) -> list[RunRecord]:
    """The complete records that are non-dominated in (`objective`, dev WER), fewest parameters first."""
    complete = [r for r in records if r.state == "complete"]
    return [complete[i] for i in non_dominated([(r.parameters.of(objective), dev_wer(r)) for r in complete])]
