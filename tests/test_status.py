"""Commands that look at a study and steer it: status, retry, abort, wherever its storage is."""

import pytest

from prunesearch.commands import status as control
from prunesearch.study.config import StudyConfig
from prunesearch.study.interrupt import Interrupt, Interrupted
from prunesearch.study.record import RunRecord
from prunesearch.workers import lease as leases
from prunesearch.workers.loop import run_loop
from prunesearch.workers.trial import WorkerTrial
from tests.servers import until
from tests.test_search import landscape, rules
from tests.workers_helpers import complete, finished, opened


def test_an_interrupt_hands_the_candidate_back_and_abort_stops_all_workers(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    study, stop = opened(config, None), Interrupt()

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full+lora8":
            assert control.abort(config.source) == 1
            until(lambda: stop.requested, "word of it")
            stop.check()
        return landscape(trial.candidate)

    with pytest.raises(Interrupted):
        run_loop(study, rules(config, 9), evaluate, stop)
    assert control.status(config.source)["aborted"]
    assert finished(study) == 1
    with pytest.raises(Interrupted):  # until it is launched again, nobody goes on
        run_loop(study, rules(config, 9), evaluate)
    assert finished(study) == 1


def test_failed_candidates_can_be_evaluated_again(config: StudyConfig) -> None:
    study, good = opened(config, None), []

    def evaluate(trial: WorkerTrial) -> RunRecord:
        state = "complete" if good or trial.key != "full" else "failed"
        return landscape(trial.candidate).model_copy(update={"state": state, "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    assert control.retry(config.source) == ["full"]
    assert control.retry(config.source) == [], "it waits already"
    assert finished(study) == 4
    good.append(True)
    go()
    assert finished(study) == 5
    assert complete(study).count("full") == 1


def test_a_retry_that_is_interrupted_is_still_pending(config: StudyConfig) -> None:
    study, state = opened(config, None), ["fail"]

    def evaluate(trial: WorkerTrial) -> RunRecord:
        if trial.key == "full" and state[0] == "stop":
            state[0] = "good"
            raise Interrupted
        bad = trial.key == "full" and state[0] == "fail"
        return landscape(trial.candidate).model_copy(update={"state": "failed" if bad else "complete", "reason": "because"})

    def go() -> None:
        run_loop(study, rules(config, 5), evaluate)

    go()
    control.retry(config.source)
    state[0] = "stop"
    with pytest.raises(Interrupted):
        go()
    go()
    assert complete(study).count("full") == 1
    assert finished(study) == 5
