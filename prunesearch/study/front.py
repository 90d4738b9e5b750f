"""The front: the complete records that no other record beats in both parameters and word error rate."""

from collections.abc import Iterable, Sequence

from prunesearch.study.candidate import Candidate, baselines
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, SplitResult, WordErrors, read_records

Point = tuple[float, float]  # parameters, WER


def complete_records(config: StudyConfig) -> list[RunRecord]:
    """The study's complete records, sorted by key. Raises StudyError if there is none."""
    folder = config.run_folder / "records"
    complete = [r for r in read_records(folder, config.name) if r.state == "complete"] if folder.is_dir() else []
    if not complete:
        raise StudyError([f"{config.name} has no complete candidate yet: `prunesearch launch {config.source}`"])
    return complete


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates (both coordinates are minimised), sorted by point, then index.

    A point dominates another one if it is nowhere greater and somewhere smaller; so equal points all stay. O(n log n): in
    sorted order, the last point kept has the lowest second coordinate so far, so each point is compared with that one only.
    """
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def pareto_front(
    records: Iterable[RunRecord], objective: str, max_worst_group_wer: float | None = None, language: str | None = None
) -> list[RunRecord]:
    """The complete records that are non-dominated in (`objective`, dev WER), fewest parameters first.

    `max_worst_group_wer`: leave out records whose worst group has a higher dev WER than this fraction. `language`: take dev
    WER on this language's utterances, and leave out records without any.
    """
    competing = [
        r
        for r in records
        if r.state == "complete"
        and within_group_limit(r, max_worst_group_wer)
        and (language is None or (r.dev and language in r.dev.by_language))
    ]
    return [competing[i] for i in non_dominated([(r.parameters.of(objective), dev_wer(r, language)) for r in competing])]


def study_front(config: StudyConfig, records: Iterable[RunRecord]) -> list[RunRecord]:
    """The front of the study's records, by its objective and within its limit on groups; trainings of a system are pooled."""
    return pareto_front(pooled_by_system(records), config.search.params_objective, config.search.max_worst_group_wer)


def baseline_and_front_systems(config: StudyConfig, complete: Sequence[RunRecord]) -> list[Candidate]:
    """The baselines, whether they are complete or not, and then the front's other systems. `complete` must not be empty."""
    named = baselines(complete[0].encoder_layers, config.search.baseline_lora_rank)
    return list(dict.fromkeys([*named.values(), *(r.candidate.system for r in study_front(config, complete))]))


def beats(record: RunRecord, other: RunRecord, objective: str) -> bool:
    """Whether the record has no more parameters than the other one, and a lower dev WER."""
    return record.parameters.of(objective) <= other.parameters.of(objective) and dev_wer(record) < dev_wer(other)


def within_group_limit(record: RunRecord, max_worst_group_wer: float | None) -> bool:
    """Whether the worst group's dev WER is at most the limit. True if there is no limit, or if no groups are known."""
    worst = record.dev.worst_group_wer if record.dev else None
    return max_worst_group_wer is None or worst is None or worst <= max_worst_group_wer


def dev_wer(record: RunRecord, language: str | None = None) -> float:
    """A complete record's dev WER (a fraction), in one language or in all. Raises ValueError for a record without one."""
    if record.dev is None:
        raise ValueError(f"{record.candidate.key} is {record.state} and has no dev result; only complete records compete")
    return (record.dev.errors if language is None else record.dev.by_language[language]).wer


def latest_dev_errors(record: RunRecord) -> WordErrors | None:
    """Dev errors at the end of the run or, for a run that ended earlier, at its last rung. None if dev was never decoded."""
    if record.dev is not None:
        return record.dev.errors
    return record.rungs[-1].errors if record.rungs else None


def pooled_by_system(records: Iterable[RunRecord]) -> list[RunRecord]:
    """One record per system. Complete trainings of the same system are pooled.

    Their errors are added up, so that the pooled WER is their mean. The pooled record has a test result only if all of these
    trainings were decoded on test.
    """
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


def knee(front: Sequence[RunRecord], objective: str) -> RunRecord:
    """The member of a front (fewest parameters first) after which more parameters lower WER least.

    It is the member farthest below the straight line from the front's first member to its last one, both axes scaled to that
    range. For a front of two members, it is the one of lower WER. After the "kneedle" of Satopää et al., "Finding a Kneedle in
    a Haystack", ICDCSW 2011. Raises ValueError for an empty front.
    """
    if not front:
        raise ValueError("a front must have at least one member to have a knee, got none")
    params, wers = [float(r.parameters.of(objective)) for r in front], [dev_wer(r) for r in front]
    if len(front) < 3 or params[0] == params[-1] or wers[0] == wers[-1]:
        return min(front, key=dev_wer)
    below = [
        1 - (p - params[0]) / (params[-1] - params[0]) - (w - wers[-1]) / (wers[0] - wers[-1])
        for p, w in zip(params, wers, strict=True)
    ]
    return front[below.index(max(below))]


def hypervolume(points: Iterable[Point], reference: Point) -> float:
    """The area of all places that some point dominates and that lie below the reference in both coordinates.

    For two objectives it is a sum of rectangles (a staircase): in the order of the first coordinate, each point that lowers
    the second one adds the rectangle between itself, the reference's first coordinate and the lowest second one so far.
    """
    area, lowest = 0.0, reference[1]
    for first, second in sorted(points):
        if first < reference[0] and second < lowest:
            area += (reference[0] - first) * (lowest - second)
            lowest = second
    return area
