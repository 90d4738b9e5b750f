"""Throughput of a storage with many workers: trials per second, and the time of an ask and a tell.

    python benchmarks/storage.py [--workers 64] [--trials 100 1000 10000] [--seconds 20] [--only journal,postgres,grpc]
    python benchmarks/storage.py --workers 8 --sampler layer-sets      # how many of 8 trials per second do 8 workers complete?
    python benchmarks/storage.py --study studies/quickstart            # the share of a study's time that is not work on trials

Trials are simulated: each one sleeps for a second. The environment variable LAYERS is the number of the encoder's layers (12).
Workers and servers run on this machine. `postgres` and `grpc` need PostgreSQL's server.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations, pairwise
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import optuna
from optuna.distributions import distribution_to_json
from optuna.trial import TrialState, create_trial
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, MetaData, create_engine, select

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from prunesearch.search.layer_sets import LayerSetSampler  # noqa: E402
from prunesearch.search.samplers import CandidateSampler  # noqa: E402
from prunesearch.search.space import SearchSpace  # noqa: E402
from prunesearch.study.candidate import Candidate  # noqa: E402
from prunesearch.study.config import load_study  # noqa: E402
from prunesearch.study.interrupt import Interrupt  # noqa: E402
from prunesearch.study.record import Parameters, RunRecord, SplitResult, WordErrors, read_records  # noqa: E402
from prunesearch.workers.claim import claim  # noqa: E402
from prunesearch.workers.lease import LeaseMonitor  # noqa: E402
from prunesearch.workers.optuna_internals import StoredStudy  # noqa: E402
from prunesearch.workers.optuna_study import open_existing_study  # noqa: E402
from prunesearch.workers.storage import open_storage  # noqa: E402
from prunesearch.workers.trial import StudyRules  # noqa: E402
from tests.servers import GrpcProxy, Postgres  # noqa: E402

STUDY = "s"
LAYERS = int(os.environ.get("LAYERS", "12"))
SPACE = SearchSpace(tuple(range(LAYERS)), LAYERS * 2 // 3, (0, 4, 8), {})
SCAN = {s: 0.1 * sum(1 + i % 5 for i in s) for k in (1, 2) for s in combinations(range(LAYERS), k)}
SAMPLERS = ("random", "layer-sets")
STORAGES = ("journal", "postgres", "grpc")
TRIAL_SECONDS = 1.0
REFERENCE_WORDS = 10_000
ENDLESS = 10**6  # trials: more than any run completes


# Simulated trials


def params_of(candidate: Candidate) -> float:
    return 1000.0 - 20 * len(candidate.removed_layers) + candidate.lora_rank


def wer_of(candidate: Candidate) -> float:
    noise = random.Random(candidate.key).gauss(0, 0.05)
    return min(1.0, 0.05 + 0.03 * sum(1 + i % 5 for i in candidate.removed_layers) * (1 + noise) / 3)


def simulated_record(candidate: Candidate) -> RunRecord:
    errors = WordErrors(substitutions=round(REFERENCE_WORDS * wer_of(candidate)), reference_words=REFERENCE_WORDS)
    return RunRecord(
        study=STUDY, encoder_layers=LAYERS, removed_layers=candidate.removed_layers, lora_rank=candidate.lora_rank, seed=0,
        state="complete", steps=1, dev=SplitResult(errors=errors, utterances=1),
        parameters=Parameters(encoder=int(params_of(candidate)), projector=0, lora=0, llm=0),
    )  # fmt: skip


def rules(trials: int) -> StudyRules:
    return StudyRules(SPACE, params_of, "speech_params", trials, rung_confidence=0.95)


def sampler_of(name: str, seed: int) -> CandidateSampler:
    return CandidateSampler(SPACE, seed) if name == "random" else LayerSetSampler(SPACE, params_of, seed, scan=SCAN)


# A study with finished trials


def fill(url: str | None, folder: Path, trials: int) -> None:
    """Bring the study to so many finished trials. Databases get them in bulk: Optuna takes forty milliseconds for each."""
    storage = open_storage(url, folder)
    study = optuna.create_study(study_name=STUDY, storage=storage, directions=["minimize"] * 2, load_if_exists=True)
    before = study.get_trials(deepcopy=False)
    seen = {t.user_attrs.get("candidate") for t in before}
    rng = random.Random(trials)
    new = []
    while len(seen) < trials:
        candidate = SPACE.draw(rng)
        if candidate.key not in seen:
            seen.add(candidate.key)
            new.append(candidate)
    if url is None:
        study.add_trials([finished_trial(c) for c in new])
    elif new:
        insert(create_engine(url), storage.get_study_id_from_name(STUDY), len(before), new)


def finished_trial(candidate: Candidate) -> optuna.trial.FrozenTrial:
    params, distributions = SPACE.params(candidate), SPACE.distributions
    values = [wer_of(candidate), params_of(candidate)]
    return create_trial(values=values, params=params, distributions=distributions, user_attrs={"candidate": candidate.key})


def insert(engine: Engine, study_id: int, first: int, candidates: list[Candidate]) -> None:
    """Write finished trials to Optuna's tables; `first` is the number of the first one."""
    schema = MetaData()
    schema.reflect(engine)
    table, distributions, now = schema.tables, SPACE.distributions, datetime.now()
    state = {"study_id": study_id, "state": "COMPLETE", "datetime_start": now, "datetime_complete": now}
    columns = table["trials"].c
    query = select(columns.number, columns.trial_id).where(columns.number >= first, columns.study_id == study_id)
    with engine.begin() as connection:
        connection.execute(table["trials"].insert(), [{"number": first + i, **state} for i in range(len(candidates))])
        ids = {number: trial_id for number, trial_id in connection.execute(query)}  # noqa: C416 - rows are no pairs for dict()
        params, values, attrs = [], [], []
        for number, candidate in enumerate(candidates, first):
            trial = {"trial_id": ids[number]}
            for name, value in SPACE.params(candidate).items():
                kind, internal = distribution_to_json(distributions[name]), distributions[name].to_internal_repr(value)
                params.append(trial | {"param_name": name, "param_value": internal, "distribution_json": kind})
            for objective, value in enumerate((wer_of(candidate), params_of(candidate))):
                values.append(trial | {"objective": objective, "value": value, "value_type": "FINITE"})
            attrs.append(trial | {"key": "candidate", "value_json": json.dumps(candidate.key)})
        connection.execute(table["trial_params"].insert(), params)
        connection.execute(table["trial_values"].insert(), values)
        connection.execute(table["trial_user_attributes"].insert(), attrs)


# Workers


@dataclass(frozen=True)
class Load:
    """How many workers use a storage, for how many seconds, and which sampler proposes their candidates."""

    workers: int
    seconds: float
    sampler: str


@dataclass(frozen=True)
class Times:
    """Seconds that each opening of the study, each ask and each tell took."""

    joins: list[float]
    asks: list[float]
    tells: list[float]


def run_worker(url: str | None, folder: Path, number: int, load: Load, all_ready: Barrier) -> None:
    """Open the study; once all workers have, claim, sleep and tell until the time is over. The times go to a file."""
    begin = time.perf_counter()
    storage = open_storage(url, folder)
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler_of(load.sampler, number))
    stored = StoredStudy(study, storage)
    stored.trials()
    joins, asks, tells = [time.perf_counter() - begin], [], []
    monitor, interrupt = LeaseMonitor(), Interrupt()
    all_ready.wait()
    end = time.monotonic() + load.seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        trial = claim(stored, rules(ENDLESS), monitor, interrupt)
        if trial is None:
            break
        asks.append(time.perf_counter() - begin)
        with trial.keep_lease(lambda: None, print):
            time.sleep(TRIAL_SECONDS)
            begin = time.perf_counter()  # a tell waits for parameters that are not written yet
        trial.tell(simulated_record(trial.candidate))
        tells.append(time.perf_counter() - begin)
    (folder / f"worker-{number}.json").write_text(json.dumps([joins, asks, tells]))


def measure(url: str | None, folder: Path, load: Load) -> Times:
    """The times of all workers."""
    for file in folder.glob("worker-*.json"):
        file.unlink()
    context = get_context("fork")
    all_ready = context.Barrier(load.workers)
    arguments = [(url, folder, number, load, all_ready) for number in range(load.workers)]
    processes = [context.Process(target=run_worker, args=a) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = [json.loads(f.read_text()) for f in folder.glob("worker-*.json")]
    return Times(*([seconds for worker in found for seconds in worker[i]] for i in range(3)))


def milliseconds(seconds: list[float], share: float) -> str:
    """The quantile that `share` of the values lie below."""
    ordered = sorted(seconds)
    return f"{1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.0f}"


def compare(load: Load, counts: list[int], storages: list[str]) -> None:
    """Print a table of the storages, each with `counts` trials in the study."""
    table = Table(
        title=f"{load.workers} workers with trials of one second, sampler {load.sampler}; ms: median, 99th percentile",
        caption="joining: the time to open the study, when all workers do so at once",
    )
    columns = "storage, trials in the study, trials per second, of the ideal, joining, ask, 99 %, tell, 99 %"
    for column in columns.split(", "):
        table.add_column(column, justify="left" if column == "storage" else "right")
    server = Postgres() if {"postgres", "grpc"} & set(storages) else None
    folder = Path(tempfile.mkdtemp(prefix="storage."))
    try:
        for count in counts:
            for name in storages:
                url = server.url if server and name != "journal" else None
                fill(url, folder, count)
                proxy = GrpcProxy(url) if name == "grpc" and url else None
                found = measure(proxy.url if proxy else url, folder, load)
                if proxy:
                    proxy.stop()
                pace = len(found.tells) / load.seconds
                both = [milliseconds(times, share) for times in (found.asks, found.tells) for share in (0.5, 0.99)]
                row = [f"{pace:.1f}", f"{100 * pace / load.workers:.0f} %", milliseconds(found.joins, 0.5), *both]
                table.add_row(name, f"{count:,}", *row)
                print(name, count, *row, file=sys.stderr, flush=True)
    finally:
        if server:
            server.remove()
        shutil.rmtree(folder)
    Console(width=120).print(table)


def overhead(study: Path) -> None:
    """Of a finished study with one worker: the share of the time between two results that is not work on a candidate."""
    config = load_study(study, data_must_exist=False)
    records = {r.candidate.key: r for r in read_records(config.run_folder / "records")}
    done = sorted(open_existing_study(config).trials(TrialState.COMPLETE), key=lambda t: t.datetime_complete)
    walls, works = [], []
    for before, trial in pairwise(done):
        cost = records[trial.user_attrs["candidate"]].cost
        walls.append((trial.datetime_complete - before.datetime_complete).total_seconds())
        works.append(cost.train_seconds + cost.encode_seconds + cost.decode_seconds)
    share = 1 - sum(works) / sum(walls)
    rest = statistics.median(wall - work for wall, work in zip(walls, works, strict=True))
    print(f"{len(walls)} candidates in {sum(walls):.0f} s: {100 * share:.2f} % is not encoding, training or decoding")
    print(f"(median {1000 * rest:.0f} ms per candidate)")


def storages(text: str) -> list[str]:
    """The names in a list with commas. Raises argparse.ArgumentTypeError for a name that is no storage's."""
    names = text.split(",")
    if unknown := [name for name in names if name not in STORAGES]:
        raise argparse.ArgumentTypeError(f"must be some of {','.join(STORAGES)}, got {unknown[0]!r}")
    return names


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10000], help="finished trials in the study")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--only", type=storages, default=list(STORAGES), help="storages, separated by commas")
    parser.add_argument("--sampler", choices=SAMPLERS, default="random")
    parser.add_argument("--study", type=Path, help="measure this finished study instead")
    a = parser.parse_args()
    if a.study:
        overhead(a.study)
    else:
        compare(Load(a.workers, a.seconds, a.sampler), a.trials, a.only)
