"""Look at a study, and steer it, from anywhere that reaches its storage: status, retry, abort."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from prunesearch.search.space import REMOVE
from prunesearch.search.study_progress import StudyProgress, is_settled
from prunesearch.speech.corpus import SPLITS
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import record_folder
from prunesearch.workers.artifacts import open_shelf
from prunesearch.workers.lease import LEASE_SECONDS, WORKER, Lease
from prunesearch.workers.optuna_study import join_study
from prunesearch.workers.storage import open_storage, shown, upgrade_storage


def left_out(config: StudyConfig) -> dict[str, int]:
    """How many lines of each split's sources the study does without, where there are any."""
    files = {split: config.run_folder / "corpus" / f"{split}.json" for split in SPLITS}
    counts = {split: len(json.loads(f.read_text(encoding="utf-8"))["dropped"]) for split, f in files.items() if f.exists()}
    return {split: count for split, count in counts.items() if count}


def _stored(source: str | Path, storage: str | None) -> tuple[StudyConfig, optuna.Study]:
    """Raises StudyError where the study was not launched; creates nothing."""
    config = load_study(source, data_must_exist=False)
    url = storage or config.storage.url
    file = Path(url.split(":///", 1)[1]) if url and url.startswith(("sqlite:///", "journal:///")) else None
    if url and url.startswith("journal:///"):
        file = Path(url.removeprefix("journal://"))
    if url is None:
        file = config.run_folder / "journal.log"
    if file is not None and not file.exists():
        raise StudyError([f"{config.name} has not been launched yet: `prunesearch launch {config.source}`"])
    return config, join_study(config, open_storage(url, config.run_folder))


def status(source: str | Path, storage: str | None = None, price: float | None = None) -> dict[str, Any]:
    """How far a study has come: trials by state, who is working on what, the best so far, and what is left. Reads only.

    `price` is what a worker costs an hour. Whether a worker on another machine lives is told by the time of its last mark,
    as its own clock had it.
    """
    config, study = _stored(source, storage)
    attrs = study.user_attrs
    trials = study.get_trials(deepcopy=False)
    budget = attrs.get("trials", config.search.trials)
    running = []
    for trial in trials:
        if trial.state == TrialState.RUNNING and (lease := Lease.of_trial(trial)):
            heard = max(0.0, time.time() - lease.renewed)
            running.append(_row(trial.number, trial.user_attrs.get("candidate"), lease, heard))
    busy = {(r["host"], r["pid"]) for r in running}
    for lease in (Lease(**value) for name, value in attrs.items() if name.startswith(WORKER) and value):
        heard = max(0.0, time.time() - lease.renewed)
        if heard < LEASE_SECONDS and (lease.host, lease.pid) not in busy and not lease.has_ended():
            running.append(_row(None, None, lease, heard))
    done = StudyProgress.of(trials).settled
    seconds = [
        (t.datetime_complete - t.datetime_start).total_seconds()
        for t in trials
        if is_settled(t) and t.datetime_complete and t.datetime_start
    ]
    each = sum(seconds) / len(seconds) if seconds else None
    alive = sum(bool(r["alive"]) for r in running)
    left = None if each is None else max(0, budget - done) * each
    best = [
        {"candidate": t.user_attrs.get("candidate"), "dev_wer": t.values[0], config.search.params_objective: t.values[1]}
        for t in sorted(study.best_trials, key=lambda t: t.values[1])
    ]
    return {
        "study": config.name,
        "settled": done,
        "trials": budget,
        "aborted": bool(attrs.get("aborted")),
        "states": {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        "ended": _endings(study),
        "running": running,
        "seconds_each": each and round(each, 1),
        "worker_hours_left": None if left is None else round(left / 3600, 3),
        "seconds_left": None if left is None or not alive else round(left / alive, 1),
        "price_left": None if left is None or price is None else round(left / 3600 * price, 2),
        "front": best,
    }


def _row(trial: int | None, candidate: str | None, lease: Lease, heard: float) -> dict[str, Any]:
    return {
        "trial": trial,
        "candidate": candidate,
        "host": lease.host,
        "pid": lease.pid,
        "alive": not lease.has_ended() and heard < LEASE_SECONDS,
        "heard_seconds_ago": round(heard, 1),
        "doing": lease.doing,
        "done": lease.done,
        "of": lease.of,
    }


def _endings(study: optuna.Study) -> dict[str, int]:
    """How many trials ended without an outcome, and why."""
    words = [t.user_attrs["ended"] for t in study.get_trials(deepcopy=False) if "ended" in t.user_attrs]
    return {word: words.count(word) for word in sorted(set(words))}


def retry(source: str | Path, storage: str | None = None) -> list[str]:
    """Have the candidates that failed evaluated once more; returns their keys. Whoever works on the study next takes them."""
    config, study = _stored(source, storage)
    trials = study.get_trials(deepcopy=False)
    failed = {key: t for key, t in StudyProgress.of(trials).latest.items() if t.state == TrialState.FAIL and is_settled(t)}
    for key, trial in failed.items():
        record = record_folder(config.run_folder / "records", Candidate.from_key(key)) / "record.json"
        if record.exists():
            record.replace(record.with_name(f"failed-{trial.number}.json"))
        if shelf := open_shelf(config):
            shelf.remove(f"records/{key}/record.json")
        candidate = Candidate.from_key(key)
        params = trial.params or next((t.params for t in trials if t.params), {})  # it may be gone before it was told
        bits = {n: int(n.removeprefix(REMOVE)) in candidate.removed_layers for n in params if n.startswith(REMOVE)}
        rest = {"lora_rank": candidate.lora_rank} | ({"repeat": candidate.repeat} if "repeat" in params else {})
        study.enqueue_trial(bits | rest, user_attrs={"candidate": key, "retry": True})
    return list(failed)


def upgrade(source: str | Path, storage: str | None = None) -> str:
    """Bring the tables of the study's database to what the installed Optuna needs. Raises StudyError."""
    config = load_study(source, data_must_exist=False)
    url = storage or config.storage.url
    if url is None or url.startswith(("journal://", "grpc://")):
        return "this storage needs no upgrade" + ("; its database may" if url and url.startswith("grpc") else "")
    return f"{shown(url)}: schema {upgrade_storage(url)}"


def serve(source: str | Path, storage: str | None, host: str, port: int, ready: Callable[[], None]) -> None:
    """Run Optuna's gRPC proxy in front of the study's database. Raises StudyError for a journal, which it does not serve."""
    config = load_study(source, data_must_exist=False)
    url = storage or config.storage.url
    if url is None or url.startswith(("journal://", "grpc://")):
        raise StudyError(["storage.url: a proxy serves a database, such as postgresql+psycopg://user@host/db"])
    opened = open_storage(url, config.run_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        ready()
        optuna.storages.run_grpc_proxy_server(opened, host=host, port=port)


def abort(source: str | Path, storage: str | None = None) -> int:
    """Have every worker stop at the next good moment, wherever it is; returns how many are at work. `launch` goes on."""
    _, study = _stored(source, storage)
    study.set_user_attr("aborted", True)
    return sum(t.state == TrialState.RUNNING for t in study.get_trials(deepcopy=False))
