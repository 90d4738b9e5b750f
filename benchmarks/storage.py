"""What many workers get out of a storage: trials a second, and how long an ask and a tell take.

    python benchmarks/storage.py [--workers 64] [--trials 100 1000 10000] [--seconds 20] [--only journal,postgres,grpc]
    python benchmarks/storage.py --workers 8 --sampler layer-sets      # how much of 8 trials a second do 8 workers complete?
    python benchmarks/storage.py --study studies/quickstart            # the share of a study's time that is not work on trials

Trials are simulated: they sleep for a second. LAYERS=24 in the environment makes the encoder as deep. Everything runs on this
machine, the server as well. Needs PostgreSQL's server.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from datetime import datetime
from itertools import combinations, pairwise
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table
from sqlalchemy import text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from prunesearch.search.layer_sets import LayerSetSampler  # noqa: E402
from prunesearch.search.samplers import CandidateSampler  # noqa: E402
from prunesearch.search.space import SearchSpace  # noqa: E402
from prunesearch.study.candidate import Candidate  # noqa: E402
from prunesearch.study.config import load_study  # noqa: E402
from prunesearch.study.interrupt import Interrupt  # noqa: E402
from prunesearch.study.record import read_records  # noqa: E402
from prunesearch.workers.claim import claim  # noqa: E402
from prunesearch.workers.lease import LeaseMonitor  # noqa: E402
from prunesearch.workers.optuna_internals import StoredStudy  # noqa: E402
from prunesearch.workers.storage import open_storage  # noqa: E402
from prunesearch.workers.trial import StudyRules  # noqa: E402
from tests.servers import GrpcProxy, Postgres  # noqa: E402

LAYERS = int(os.environ.get("LAYERS", "12"))
SPACE = SearchSpace(tuple(range(LAYERS)), LAYERS * 2 // 3, (0, 4, 8), {})
SCAN = {s: 0.1 * sum(1 + i % 5 for i in s) for k in (1, 2) for s in combinations(range(LAYERS), k)}


def params_of(candidate: Candidate) -> float:
    return 1000.0 - 20 * len(candidate.removed_layers) + candidate.lora_rank


def wer_of(candidate: Candidate) -> float:
    noise = random.Random(candidate.key).gauss(0, 0.05)
    return min(1.0, 0.05 + 0.03 * sum(1 + i % 5 for i in candidate.removed_layers) * (1 + noise) / 3)


def sampler(name: str, seed: int) -> CandidateSampler:
    return CandidateSampler(SPACE, seed) if name == "random" else LayerSetSampler(SPACE, params_of, seed, scan=SCAN)


def labour(url: str | None, folder: Path, number: int, kind: str, ready: Barrier, seconds: float) -> None:
    """Join, and when all have: claim, sleep, tell, until the time is over. What it took goes to a file."""
    begin = time.perf_counter()
    storage = open_storage(url, folder)
    study = StoredStudy(optuna.load_study(study_name="s", storage=storage, sampler=sampler(kind, number)), storage)
    study.trials()
    joins, asks, tells = [time.perf_counter() - begin], [], []
    monitor, interrupt = LeaseMonitor(), Interrupt()
    rules = StudyRules(SPACE, params_of, "speech_params", 10**6, 0.95, folder)
    ready.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.perf_counter()
        claimed = claim(study, rules, monitor, interrupt)
        asked = time.perf_counter()
        if claimed is None:
            break
        with claimed.held(lambda: None, print):
            time.sleep(1.0)
        woken = time.perf_counter()
        values = [wer_of(claimed.candidate), params_of(claimed.candidate)]
        study.end_trial(claimed.trial, TrialState.COMPLETE, values)
        tells.append(time.perf_counter() - woken)
        asks.append(asked - start)
    (folder / f"worker-{number}.json").write_text(json.dumps([joins, asks, tells]))


def filled(url: str | None, folder: Path, trials: int) -> None:
    """A study with so many finished trials; a database gets them in bulk, for Optuna takes some forty milliseconds for each."""
    storage = open_storage(url, folder)
    study = optuna.create_study(study_name="s", storage=storage, directions=["minimize"] * 2, load_if_exists=True)
    seen = {t.user_attrs.get("candidate") for t in study.get_trials(deepcopy=False)}
    rng = random.Random(trials)
    new = []
    while len(seen) < trials:
        candidate = SPACE.draw(rng)
        if candidate.key not in seen:
            seen.add(candidate.key)
            new.append(candidate)
    if url is None:
        study.add_trials([finished(c) for c in new])
    else:
        database = RDBStorage(url)
        insert(database, database.get_study_id_from_name("s"), len(study.get_trials(deepcopy=False)), new)


def finished(candidate: Candidate) -> optuna.trial.FrozenTrial:
    params, kinds = SPACE.params(candidate), SPACE.distributions
    values = [wer_of(candidate), params_of(candidate)]
    return create_trial(values=values, params=params, distributions=kinds, user_attrs={"candidate": candidate.key})


def insert(database: RDBStorage, study: int, first: int, candidates: list[Candidate]) -> None:
    if not candidates:
        return
    now, kinds = datetime.now(), SPACE.distributions
    times = {"datetime_start": now, "datetime_complete": now}
    trials = [{"number": first + i, "study_id": study, "state": TrialState.COMPLETE, **times} for i in range(len(candidates))]
    query = text("SELECT number, trial_id FROM trials WHERE number >= :first AND study_id = :study")
    with database.engine.begin() as connection:
        connection.execute(models.TrialModel.__table__.insert(), trials)
        ids = {number: trial for number, trial in connection.execute(query, {"first": first, "study": study})}  # noqa: C416
        params, values, attrs = [], [], []
        for i, candidate in enumerate(candidates):
            trial = {"trial_id": ids[first + i]}
            for name, value in SPACE.params(candidate).items():
                kind, internal = distribution_to_json(kinds[name]), kinds[name].to_internal_repr(value)
                params.append(trial | {"param_name": name, "param_value": internal, "distribution_json": kind})
            for objective, value in enumerate((wer_of(candidate), params_of(candidate))):
                finite = models.TrialValueModel.TrialValueType.FINITE
                values.append(trial | {"objective": objective, "value": value, "value_type": finite})
            attrs.append(trial | {"key": "candidate", "value_json": json.dumps(candidate.key)})
        connection.execute(models.TrialParamModel.__table__.insert(), params)
        connection.execute(models.TrialValueModel.__table__.insert(), values)
        connection.execute(models.TrialUserAttributeModel.__table__.insert(), attrs)


def measured(url: str | None, folder: Path, workers: int, kind: str, seconds: float) -> tuple[float, list[list[float]]]:
    """Trials a second, and the seconds that joining the study, asks and tells took."""
    for file in folder.glob("worker-*.json"):
        file.unlink()
    context = get_context("fork")
    ready = context.Barrier(workers)
    arguments = [(url, folder, n, kind, ready, seconds) for n in range(workers)]
    processes = [context.Process(target=labour, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [json.loads(f.read_text()) for f in folder.glob("worker-*.json")]
    joins, asks, tells = ([x for each in found for x in each[i]] for i in range(3))
    return len(tells) / seconds, [joins, asks, tells]


def at(values: list[float], share: float) -> str:
    ordered = sorted(values)
    return f"{1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.0f}"


def compare(workers: int, counts: list[int], seconds: float, only: list[str], kind: str) -> None:
    table = Table(
        title=f"{workers} workers with trials of a second, sampler {kind}; ms: median, 99th percentile",
        caption="join: all workers read the study at once",
    )
    for column in ("storage", "trials in it", "trials a second", "of the ideal", "join", "ask", "99 %", "tell", "99 %"):
        table.add_column(column, justify="left" if column == "storage" else "right")
    server = Postgres() if {"postgres", "grpc"} & set(only) else None
    folder = Path(tempfile.mkdtemp(prefix="storage."))
    try:
        for count in counts:
            for name in only:
                url = server.url if server and name != "journal" else None
                filled(url, folder, count)
                proxy = GrpcProxy(url) if name == "grpc" and url else None
                pace, [joins, asks, tells] = measured(proxy.url if proxy else url, folder, workers, kind, seconds)
                if proxy:
                    proxy.stop()
                times = (at(joins, 0.5), at(asks, 0.5), at(asks, 0.99), at(tells, 0.5), at(tells, 0.99))
                table.add_row(name, f"{count:,}", f"{pace:.1f}", f"{100 * pace / workers:.0f} %", *times)
                print(name, count, f"{pace:.1f} trials a second", *times, file=sys.stderr, flush=True)
    finally:
        if server:
            server.remove()
    Console(width=120).print(table)


def overhead(study: Path) -> None:
    """From one worker's finished study: between two outcomes, how much is neither encoding, training nor decoding?"""
    config = load_study(study, data_must_exist=False)
    records = {r.candidate.key: r for r in read_records(config.run_folder / "records")}
    stored = optuna.load_study(study_name=config.name, storage=open_storage(config.storage.url, config.run_folder))
    done = sorted(stored.get_trials(deepcopy=False, states=[TrialState.COMPLETE]), key=lambda t: t.datetime_complete)
    shares = []
    for before, trial in pairwise(done):
        wall = (trial.datetime_complete - before.datetime_complete).total_seconds()
        cost = records[trial.user_attrs["candidate"]].cost
        shares.append((wall, cost.train_seconds + cost.encode_seconds + cost.decode_seconds))
    wall, work = sum(w for w, _ in shares), sum(w for _, w in shares)
    rest = statistics.median(w - k for w, k in shares)
    print(f"{len(shares)} candidates in {wall:.0f} s: {100 * (1 - work / wall):.2f} % is not encoding, training or decoding")
    print(f"(median {1000 * rest:.0f} ms a candidate)")


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--only", default="journal,postgres,grpc")
    parser.add_argument("--sampler", choices=["random", "layer-sets"], default="random")
    parser.add_argument("--study", type=Path)
    a = parser.parse_args()
    if a.study:
        overhead(a.study)
    else:
        compare(a.workers, a.trials, a.seconds, a.only.split(","), a.sampler)
