"""The search on functions instead of models: space, sampler, storage, budgets, kills."""

import itertools
import math
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.rungs import ENOUGH, Finished, chance_of_domination
from prunesearch.search.samplers import CandidateSampler, optuna_sampler
from prunesearch.search.space import SearchSpace
from prunesearch.search.study_progress import StudyProgress
from prunesearch.study.candidate import BASELINE_NAMES, Candidate, baselines
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import Parameters, Rung, RunRecord, SplitResult, WordErrors
from prunesearch.workers.loop import run_loop
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import open_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.trial import StudyRules, WorkerTrial
from tests.conftest import write_study

DEPTH = 6


def space(**changes: object) -> SearchSpace:
    settings = {"removable": tuple(range(DEPTH)), "max_removed": 3, "ranks": (0, 4), "named": baselines(DEPTH, 8)}
    return SearchSpace(**{**settings, **changes})  # type: ignore[arg-type]


def landscape(candidate: Candidate) -> RunRecord:
    """Later layers cost less; neighbours together cost less than apart; LoRA repairs."""
    layers = candidate.removed_layers
    cost = sum(0.03 * (DEPTH - i) for i in layers) - 0.02 * sum(b - a == 1 for a, b in itertools.pairwise(layers))
    wer = round(1000 * (0.1 + cost) / (1 + 0.1 * math.log1p(candidate.lora_rank)))
    counts = SplitResult(errors=WordErrors(substitutions=wer, reference_words=1000), utterances=10)
    size = Parameters(encoder=100 - 10 * len(layers), projector=5, lora=candidate.lora_rank, llm=50)
    return RunRecord(
        study="s", encoder_layers=DEPTH, removed_layers=layers, lora_rank=candidate.lora_rank, seed=0, state="complete",
        steps=1, dev=counts, parameters=size,
    )  # fmt: skip


def holds(where: SearchSpace, candidate: Candidate) -> bool:
    layers = set(candidate.removed_layers)
    return layers <= set(where.removable) and len(layers) <= where.max_removed and candidate.lora_rank in where.ranks


def params_of(candidate: Candidate) -> int:
    return landscape(candidate).parameters.speech


@pytest.fixture
def config(toy: Path, tmp_path: Path) -> StudyConfig:
    return load_study(write_study(tmp_path / "study", toy))


def rules(config: StudyConfig, trials: int, where: SearchSpace | None = None, confidence: float = 0.95) -> StudyRules:
    return StudyRules(where or space(), params_of, "speech_params", trials, confidence)


def count_finished(stored: StoredStudy) -> int:
    return StudyProgress.of(stored.trials()).finished


def run(
    config: StudyConfig, trials: int, where: SearchSpace | None = None, evaluate: object = None, confidence: float = 0.95
) -> StoredStudy:
    where = where or space()
    sampler = optuna_sampler("tpe", where, 0, 12)
    stored = open_study(config, open_storage(None, config.run_folder), where, sampler)
    evaluated = evaluate or (lambda trial: landscape(trial.candidate))
    run_loop(stored, rules(config, trials, where, confidence), evaluated)  # type: ignore[arg-type]
    return stored


def proposals(stored: StoredStudy) -> list[str]:
    return [t.user_attrs["candidate"] for t in stored.trials(TrialState.COMPLETE)]


def test_a_candidate_round_trips_through_optunas_parameters() -> None:
    rng, wide = random.Random(0), space(ranks=(0, 1, 16))
    for candidate in [*(wide.draw(rng) for _ in range(200)), *wide.named.values()]:
        assert wide.candidate(wide.params(candidate)) == candidate


def test_the_size_of_a_space_equals_the_number_of_listed_candidates() -> None:
    small = space(removable=(1, 2, 5), max_removed=2)
    everything = small.everything()
    assert len(set(everything)) == len(everything) == small.size == (1 + 3 + 3) * 2
    assert all(holds(small, c) for c in everything)
    rng = random.Random(0)
    assert {small.draw(rng) for _ in range(500)} == set(everything)


def test_clipping_keeps_allowed_layers_and_ranks() -> None:
    small, rng = space(removable=(1, 2, 5), max_removed=2), random.Random(0)
    for _ in range(100):
        wild = Candidate(tuple(rng.sample(range(DEPTH), rng.randint(0, 6))), rng.choice([0, 4, 8]))
        tame = small.clipped(wild, rng)
        assert holds(small, tame)
        assert set(tame.removed_layers) <= set(wild.removed_layers)
        if holds(small, wild):
            assert tame == wild


def test_fixed_candidates_come_once_and_after_the_baselines(toy: Path, tmp_path: Path) -> None:
    fixed = [{"removed_layers": [0]}, {"removed_layers": [2, 3]}]  # the second is top2 of four layers
    named = SearchSpace.of(load_study(write_study(tmp_path, toy, search={"fixed": fixed})), 4).named
    assert list(named) == [*BASELINE_NAMES, "minus-0"]


def sampler_for(name: str, where: SearchSpace) -> CandidateSampler:
    scan = {s: 0.1 * len(s) for k in (1, 2) for s in itertools.combinations(where.removable, k)}
    if name.startswith("layer-sets"):
        return LayerSetSampler(where, params_of, 0, 5, scan if name.endswith("scan") else None)
    return optuna_sampler(name, where, 0, 5)


@pytest.mark.parametrize("sampler", ["layer-sets", "layer-sets with scan", "tpe", "nsga2", "random", "grid"])
def test_samplers_propose_every_candidate_of_the_space_exactly_once(sampler: str) -> None:
    small = space(removable=(2, 3, 4, 5), max_removed=2, named={})
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler_for(sampler, small))
    keys = []
    for _ in range(small.size):
        trial = study.ask(small.distributions)
        candidate = small.candidate(trial.params)
        assert holds(small, candidate)
        trial.set_user_attr("candidate", candidate.key)
        keys.append(candidate.key)
        study.tell(trial, [landscape(candidate).dev.errors.wer, params_of(candidate)])  # type: ignore[union-attr]
    assert len(set(keys)) == small.size


def test_baselines_first_then_proposals_until_the_budget_is_used(config: StudyConfig) -> None:
    study = run(config, 12)
    assert proposals(study)[:4] == [c.key for c in baselines(DEPTH, 8).values()]
    assert [t.user_attrs.get("name") for t in study.trials()][:5] == [*BASELINE_NAMES, None]
    assert len(set(proposals(study))) == len(proposals(study)) == count_finished(study) == 12
    run(config, 12)
    assert count_finished(study) == 12, "launched again, nothing is left to do"
    run(config, 15)
    assert count_finished(study) == 15, "a wider budget goes on"


def test_an_exhausted_space_ends_the_study(config: StudyConfig) -> None:
    tiny = space(removable=(4, 5), max_removed=1)  # three sets, two ranks; unpruned is a baseline too
    study = run(config, 50, tiny)
    assert len(set(proposals(study))) == len(proposals(study)) == 4 + tiny.size - 1


def test_an_interrupted_study_gets_the_same_proposals_as_an_uninterrupted_one(toy: Path, tmp_path: Path) -> None:
    calm = load_study(write_study(tmp_path / "calm" / "s", toy))
    stopped = load_study(write_study(tmp_path / "stopped" / "s", toy))
    expected = proposals(run(calm, 14))
    for trials in range(1, 15):
        found = proposals(run(stopped, trials))
    assert found == expected


def test_released_candidates_come_first_and_are_not_counted(config: StudyConfig) -> None:
    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.candidate == Candidate((4, 5)) and not gone:
            gone.append(trial.candidate)
            raise KeyboardInterrupt
        return landscape(trial.candidate)

    gone: list[Candidate] = []
    with pytest.raises(KeyboardInterrupt):
        run(config, 9, evaluate=evaluate)
    study = run(config, 9, evaluate=evaluate)
    assert study.trials()[2].user_attrs["ended"] == "handed back"
    assert proposals(study)[2] == "minus-4-5"
    assert Counter(proposals(study)).most_common(1)[0][1] == 1
    assert count_finished(study) == 9


def test_another_definition_is_refused_and_the_difference_named(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy)
    run(load_study(file), 4)
    write_study(tmp_path, toy, training={"steps": 99}, search={"trials": 77})
    with pytest.raises(StudyError, match=r"training\.steps: this study was started with 8, the study file now says 99"):
        run(load_study(file), 5)


def test_failed_and_pruned_candidates_count_as_finished_but_not_as_complete(config: StudyConfig) -> None:
    def evaluate(trial: WorkerTrial) -> RunRecord:
        state = {8: "failed", 4: "pruned"}.get(trial.candidate.lora_rank, "complete")
        return landscape(trial.candidate).model_copy(update={"state": state, "reason": "because"})

    study = run(config, 10, evaluate=evaluate)
    states = Counter(t.state for t in study.trials())
    assert count_finished(study) == sum(states.values()) == 10
    assert states[TrialState.FAIL] == 2
    assert all(t.params["lora_rank"] == 0 for t in study.study.best_trials)
    assert all(t.user_attrs["reason"] == "because" for t in study.trials() if t.state != TrialState.COMPLETE)


def finished(count: int, noise: float, seed: int = 0, falls: float = 0.5) -> list[Finished]:
    """Trials whose WER halves from rung to end, up to noise (by default a count's); none has fewer than 100 parameters."""
    rng = random.Random(seed)
    ats = [rng.uniform(math.log(0.1), math.log(0.9)) for _ in range(count)]
    ends = [0.9 * at - 0.7 + rng.gauss(0, noise * math.exp(-falls * at)) for at in ats]
    return [Finished(100 + i, math.exp(end), math.exp(at)) for i, (at, end) in enumerate(zip(ats, ends, strict=True))]


def test_domination_is_predicted_from_the_rungs_of_finished_trials() -> None:
    known = [*finished(30, 0.05), Finished(50, 0.2, None)]
    ends_at = math.exp((math.log(0.2) + 0.7) / 0.9)  # what a trial shows at the rung that ends where the smallest one did
    assert chance_of_domination(ends_at, 60, known) == pytest.approx(0.5, abs=0.15)
    assert chance_of_domination(2 * ends_at, 60, known) > 0.99
    assert chance_of_domination(0.5 * ends_at, 60, known) < 0.01
    assert chance_of_domination(0.9, 40, known) == 0, "nothing so small has finished"
    assert chance_of_domination(0.9, 60, known[: ENOUGH - 1]) == 0, "too few have finished"


@pytest.mark.parametrize(("noise", "falls", "most"), [(0.1, 0.5, 0.92), (0.2, 0.0, 0.97)])
def test_the_chance_of_domination_equals_a_simulated_frequency(noise: float, falls: float, most: float) -> None:
    """Of the trials that are given a chance of 80 to 90 %, that many end above; more, where noise is even: too careful."""
    hits, rng = [], random.Random(5)
    for seed in range(3000):
        at = rng.uniform(math.log(0.2), math.log(0.8))
        known = [*finished(12, noise, seed, falls), Finished(50, 0.25, None)]
        if 0.8 < chance_of_domination(math.exp(at), 60, known) < 0.9:
            hits.append(
                0.9 * at - 0.7 + rng.gauss(0, 0.1 * math.exp(-falls * at))
                > math.log(min(f.wer for f in known if f.params <= 60))
            )
    assert len(hits) > 100
    assert 0.78 < sum(hits) / len(hits) < most


def test_rungs_end_dominated_trials_but_never_a_baseline(config: StudyConfig) -> None:
    def evaluate(trial: WorkerTrial) -> RunRecord:
        record = landscape(trial.candidate)
        assert record.dev
        stop = trial.ends_at_rung(1, record.dev.errors)
        return record.model_copy(update={"state": "pruned" if stop else "complete"})

    study = run(config, 30, evaluate=evaluate)
    pruned = [t for t in study.trials() if t.state == TrialState.PRUNED]
    assert pruned
    assert not any(t.user_attrs.get("name") in BASELINE_NAMES for t in pruned)
    best = {t.user_attrs["candidate"] for t in study.study.best_trials}
    assert best.isdisjoint(t.user_attrs["candidate"] for t in pruned)


def test_an_existing_records_rungs_are_stored_in_the_trial(config: StudyConfig) -> None:
    def found(trial: WorkerTrial) -> RunRecord:
        record = landscape(trial.candidate)
        assert record.dev
        rungs = (Rung(step=1, errors=record.dev.errors),)
        return record.model_copy(update={"rungs": rungs, "state": "pruned" if trial.candidate.lora_rank == 4 else "complete"})

    study = run(config, 12, evaluate=found)
    settled_trials = study.trials(TrialState.COMPLETE, TrialState.PRUNED)
    assert {t.state for t in settled_trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(t.user_attrs["rung_1"]["wer"] > 0 for t in settled_trials)


def slow_worker(source: Path) -> None:
    def evaluate(trial: WorkerTrial) -> RunRecord:
        with (source.parent / "evaluated.txt").open("a") as log:
            log.write(trial.key + "\n")
        time.sleep(random.random() * 0.05)
        return landscape(trial.candidate)

    run(load_study(source), 20, evaluate=evaluate)


def test_workers_share_a_study_survive_kills_and_evaluate_nothing_twice(config: StudyConfig) -> None:
    where = space()
    study = open_study(config, open_storage(None, config.run_folder), where)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_worker, args=(config.source,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    deadline = time.time() + 60
    while count_finished(study) < 6 and time.time() < deadline:
        time.sleep(0.02)
    os.kill(workers[0].pid or 0, signal.SIGKILL)
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers[1:]] == [0, 0, 0]
    assert count_finished(study) == 20
    assert len(set(proposals(study))) == 20
    assert not study.trials(TrialState.RUNNING, TrialState.WAITING)
    started = Counter((config.folder / "evaluated.txt").read_text().split())
    assert sum(started.values()) <= 21, "only what the killed worker was at is evaluated again"


def test_a_truncated_journal_is_repaired(config: StudyConfig) -> None:
    run(config, 4)
    journal = config.run_folder / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 4, "worker_id": "x", "tri')
    assert count_finished(run(config, 6)) == 6
    assert journal.read_bytes().startswith(whole)


def test_a_storage_that_cannot_be_opened_is_one_line_without_the_password(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        open_storage("mysql+nodriver://me:secret@127.0.0.1:1/db", tmp_path)
    assert len(caught.value.lines) == 1
    assert "secret" not in str(caught.value)


def test_sqlite_works_for_one_worker(toy: Path, tmp_path: Path) -> None:
    config = load_study(write_study(tmp_path, toy))
    where = space()
    study = open_study(config, open_storage(f"sqlite:///{tmp_path}/s.db", config.run_folder), where)
    run_loop(study, rules(config, 6, where, 0.1), lambda trial: landscape(trial.candidate))
    assert count_finished(study) == 6
