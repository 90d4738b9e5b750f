"""The test split: decoded once, at the end, for the baselines and the front only."""

from typing import TYPE_CHECKING

from prunesearch.search.study_progress import StudyProgress, is_finished
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.front import pooled_by_system, study_front
from prunesearch.study.interrupt import Interrupt, locked
from prunesearch.study.progress import ProgressListener
from prunesearch.study.record import RunRecord, read_records
from prunesearch.workers.artifacts import open_artifacts
from prunesearch.workers.optuna_study import load_stored_study
from prunesearch.workers.storage import open_storage
from prunesearch.workers.worker import open_context

if TYPE_CHECKING:
    from prunesearch.training.context import TrainingContext


def fetch_records(config: StudyConfig, storage: str | None = None) -> None:
    """Fetch the records of other workers, if the study has an artifact store. Raises StudyError."""
    if (artifacts := open_artifacts(config)) is None:
        return
    stored = load_stored_study(config, open_storage(storage or config.storage.url, config.run_folder))
    finished = StudyProgress.of(stored.trials()).latest.items()
    artifacts.fetch_records(Candidate.from_key(key) for key, trial in finished if is_finished(trial))


def untested(config: StudyConfig) -> list[RunRecord]:
    """All complete trainings of the baselines' and the front's systems that were not decoded on test yet."""
    complete = [r for r in read_records(config.run_folder / "records", config.name) if r.state == "complete"]
    named = (s for s in pooled_by_system(complete) if s.name)
    wanted = {r.candidate for r in (*study_front(config, complete), *named)}
    return [r for r in complete if r.candidate.system in wanted and r.test is None]


def decode_final_test(
    config: StudyConfig,
    listener: ProgressListener,
    interrupt: Interrupt,
    context: "TrainingContext | None" = None,
    storage: str | None = None,
) -> None:
    """Decode test for the `untested` records, while other workers wait. `context`: models that are loaded already.

    Raises Interrupted.
    """
    from prunesearch.training.recipe import decode_test

    fetch_records(config, storage)
    with locked(config.run_folder / "test.lock", interrupt.check):
        if not (records := untested(config)):
            return
        context = context or open_context(config, listener.progress, interrupt.check)
        artifacts = open_artifacts(config)
        for done, record in enumerate(records):
            listener.progress("decoding test", done, len(records))
            decode_test(context, record)
            if artifacts:
                artifacts.put_record(record.candidate)
