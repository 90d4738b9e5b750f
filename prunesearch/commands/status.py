"""status, retry and abort: show and control a study from any machine that can reach its storage."""

import time
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel

from prunesearch.search.samplers import WORST_GROUP_WER
from prunesearch.search.space import candidate_params
from prunesearch.search.study_progress import StudyProgress, candidate_key, is_finished, is_foreign
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.files import read_json
from prunesearch.study.front import non_dominated
from prunesearch.study.record import record_folder
from prunesearch.study.search_config import SearchConfig
from prunesearch.workers.artifacts import open_artifacts
from prunesearch.workers.lease import LEASE_SECONDS, WORKER, Lease
from prunesearch.workers.optuna_study import open_existing_study


class _CorpusReport(BaseModel):
    """What is needed here of a file that `speech.corpus` writes."""

    dropped: list[dict[str, str]]


def left_out(config: StudyConfig) -> dict[str, int]:
    """Number of lines of each split's sources that the study does not use; splits without any are left out."""
    files = {split: config.run_folder / "corpus" / f"{split}.json" for split in config.data.splits}
    fix = "delete it: the next launch writes it again"
    counts = {split: len(read_json(f, _CorpusReport, fix).dropped) for split, f in files.items() if f.exists()}
    return {split: count for split, count in counts.items() if count}


def status(source: str | Path, storage: str | None = None, price: float | None = None) -> dict[str, Any]:
    """A study's progress: trials by state, workers and their activity, the front so far, and the remaining work. Only reads.

    `price`: cost of a worker per hour. Whether a worker on another machine is alive is judged by the time of its last
    heartbeat, on that machine's clock. Raises StudyError for a study that was not launched.
    """
    config = load_study(source, data_must_exist=False)
    stored = open_existing_study(config, storage)
    attrs, trials = stored.attrs, stored.trials()
    budget, finished = attrs.get("trials", config.search.trials), StudyProgress.of(trials).finished
    workers = _workers(attrs, trials)
    alive = sum(bool(w["alive"]) for w in workers)
    each = _mean_seconds(trials)
    left = None if each is None else max(0, budget - finished) * each
    return {
        "study": config.name,
        "settled": finished,
        "trials": budget,
        "aborted": bool(attrs.get("aborted")),
        "states": {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        "ended": _endings(trials),
        "running": workers,
        "seconds_each": each and round(each, 1),
        "worker_hours_left": None if left is None else round(left / 3600, 3),
        "seconds_left": None if left is None or not alive else round(left / alive, 1),
        "price_left": None if left is None or price is None else round(left / 3600 * price, 2),
        "front": _front(trials, config.search),
    }


def _workers(attrs: dict[str, Any], trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """A row for each running trial, then one for each worker without a trial (it trains the anchor, or scans)."""
    rows = []
    for trial in trials:
        if trial.state == TrialState.RUNNING and (lease := Lease.of_trial(trial)):
            rows.append(_worker(trial.number, candidate_key(trial), lease))
    busy = {(row["host"], row["pid"]) for row in rows}
    announced = (Lease(**value) for name, value in attrs.items() if name.startswith(WORKER) and value)
    without_trial = [_worker(None, None, lease) for lease in announced if (lease.host, lease.pid) not in busy]
    return [*rows, *(row for row in without_trial if row["alive"])]


def _worker(trial: int | None, candidate: str | None, lease: Lease) -> dict[str, Any]:
    silent = max(0.0, time.time() - lease.renewed)
    return {
        "trial": trial,
        "candidate": candidate,
        "host": lease.host,
        "pid": lease.pid,
        "alive": not lease.has_ended() and silent < LEASE_SECONDS,
        "heard_seconds_ago": round(silent, 1),
        "doing": lease.doing,
        "done": lease.done,
        "of": lease.of,
    }


def _mean_seconds(trials: list[FrozenTrial]) -> float | None:
    """Mean duration of the trials that have an outcome."""
    seconds = [
        (t.datetime_complete - t.datetime_start).total_seconds()
        for t in trials
        if candidate_key(t) and is_finished(t) and t.datetime_complete and t.datetime_start
    ]
    return sum(seconds) / len(seconds) if seconds else None


def _endings(trials: list[FrozenTrial]) -> dict[str, int]:
    """Number of trials that ended without an outcome, by the reason."""
    words = [t.user_attrs["ended"] for t in trials if "ended" in t.user_attrs]
    return {word: words.count(word) for word in sorted(set(words))}


def _front(trials: list[FrozenTrial], search: SearchConfig) -> list[dict[str, Any]]:
    """The best trials that evaluated a candidate, fewest parameters first."""
    limit = search.max_worst_group_wer
    latest = {key: t for t in trials if t.state == TrialState.COMPLETE and (key := candidate_key(t))}
    competing = [
        (key, t.values[0], t.values[1])
        for key, t in latest.items()
        if (limit is None or t.user_attrs.get(WORST_GROUP_WER, 0.0) <= limit)
    ]
    best = [competing[i] for i in non_dominated([(params, wer) for _, wer, params in competing])]
    return [{"candidate": key, "dev_wer": wer, search.params_objective: params} for key, wer, params in best]


def retry(source: str | Path, storage: str | None = None) -> list[str]:
    """Re-queue the candidates that failed, and finished ones whose record was lost; returns their keys.

    A record counts as lost if neither the run folder nor the artifact store has it. A run folder without any record is not
    the study's own (this machine only looks on), so that no record counts as lost there.
    """
    config = load_study(source, data_must_exist=False)
    stored = open_existing_study(config, storage)
    trials, artifacts = stored.trials(), open_artifacts(config)
    records = config.run_folder / "records"
    latest = {key: t for key, t in StudyProgress.of(trials).latest.items() if is_finished(t)}
    if artifacts:
        artifacts.fetch_records(map(Candidate.from_key, latest))
    knows_records = any(records.glob("*/record.json"))
    again: list[str] = []
    for key, trial in latest.items():
        candidate = Candidate.from_key(key)
        record = record_folder(records, candidate) / "record.json"
        failed, lost = trial.state == TrialState.FAIL, knows_records and not record.exists()
        if not failed and not lost:
            continue
        if record.exists():
            record.replace(record.with_name(f"failed-{trial.number}.json"))
        if artifacts:
            artifacts.remove(f"records/{key}/record.json")
        names = trial.params or next((t.params for t in trials if t.params and not is_foreign(t)), {})  # none if killed early
        stored.study.enqueue_trial(candidate_params(candidate, names), user_attrs={"candidate": key, "retry": True})
        again.append(key)
    return again


def abort(source: str | Path, storage: str | None = None) -> int:
    """Ask every worker to stop as soon as it can; returns the number of running trials. `launch` continues the study."""
    stored = open_existing_study(load_study(source, data_must_exist=False), storage)
    stored.set_attr("aborted", True)
    return sum(not is_foreign(t) for t in stored.trials(TrialState.RUNNING))
