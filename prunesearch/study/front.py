"""The front: the records that no other record beats in both parameters and word error rate."""

from collections.abc import Iterable, Sequence

from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, SplitResult, read_records


def complete_records(config: StudyConfig) -> list[RunRecord]:
    """The study's complete records, by key. Raises StudyError where there is none."""
    folder = config.run_folder / "records"
    complete = [r for r in read_records(folder) if r.state == "complete"] if folder.is_dir() else []
    if not complete:
        raise StudyError([f"{config.name} has no complete candidate yet: `prunesearch launch {config.source}`"])
    return complete


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


def pooled_by_system(records: Iterable[RunRecord]) -> list[RunRecord]:
    """One record for each system: of one that was trained several times, all complete trainings as one (their errors added up,
    so that its WER is the mean); test only where every one of them was decoded there."""
    systems: dict[Candidate, list[RunRecord]] = {}
    for record in records:
        systems.setdefault(record.candidate.system, []).append(record)
    return [_pooled(trainings) for trainings in systems.values()]


def _pooled(trainings: list[RunRecord]) -> RunRecord:
    complete = [r for r in trainings if r.state == "complete"]
    first = min(complete or trainings, key=lambda r: r.repeat)
    name = next((r.name for r in trainings if r.name), None)
    if len(complete) < 2:
        return first.model_copy(update={"name": name, "repeat": 0})
    dev = [r.dev for r in complete if r.dev]
    test = [r.test for r in complete if r.test]
    both = {"dev": SplitResult.pooled(dev), "test": SplitResult.pooled(test) if len(test) == len(complete) else None}
    return first.model_copy(update={"name": name, "repeat": 0, **both})


def dev_wer(record: RunRecord) -> float:
    """A complete record's dev WER (a fraction). Raises ValueError for a record without one."""
    if record.dev is None:
        raise ValueError(f"{record.candidate.key} is {record.state} and has no dev result; only complete records compete")
    return record.dev.errors.wer


def knee(front: Sequence[RunRecord], objective: str) -> RunRecord:
    """The member of a front (fewest parameters first) beyond which more parameters buy least: the one farthest below the
    straight line from the front's first to its last, both axes scaled to that. One of two members: that of lower WER.

    After the "kneedle" of Satopää et al., "Finding a Kneedle in a Haystack", ICDCSW 2011. Raises ValueError for no member.
    """
    if not front:
        raise ValueError("a front without members has no knee")
    params, wers = [float(r.parameters.of(objective)) for r in front], [dev_wer(r) for r in front]
    if len(front) < 3 or params[0] == params[-1] or wers[0] == wers[-1]:
        return min(front, key=dev_wer)
    below = [
        1 - (p - params[0]) / (params[-1] - params[0]) - (w - wers[-1]) / (wers[0] - wers[-1])
        for p, w in zip(params, wers, strict=True)
    ]
    return front[below.index(max(below))]


def hypervolume(front: Sequence[RunRecord], objective: str, reference: tuple[float, float]) -> float:
    """The area that a front dominates, up to the reference (parameters, WER); by Optuna's own routine."""
    import numpy as np
    from optuna._hypervolume import compute_hypervolume

    points = np.array([(r.parameters.of(objective), dev_wer(r)) for r in front], dtype=float).reshape(-1, 2)
    inside = points[(points < np.array(reference)).all(1)]
    return float(compute_hypervolume(inside, np.array(reference))) if len(inside) else 0.0


def pareto_front(records: Iterable[RunRecord], objective: str, max_worst_group_wer: float | None = None) -> list[RunRecord]:
    """The complete records that are non-dominated in (`objective`, dev WER), fewest parameters first; only those whose worst
    group keeps within the limit, where there is one."""
    complete = [r for r in records if r.state == "complete" and within(r, max_worst_group_wer)]
    return [complete[i] for i in non_dominated([(r.parameters.of(objective), dev_wer(r)) for r in complete])]


def within(record: RunRecord, max_worst_group_wer: float | None) -> bool:
    """Whether its worst group's dev WER keeps within the limit, where there is one and groups are known."""
    worst = record.dev.worst_group_wer if record.dev else None
    return max_worst_group_wer is None or worst is None or worst <= max_worst_group_wer
