"""Creating a study in its storage, with a budget that all of its workers share."""

from collections.abc import Callable

from optuna.storages import BaseStorage

from prunesearch.model.families import encoder_layers
from prunesearch.search.space import SearchSpace
from prunesearch.speech.corpus import load_corpus
from prunesearch.speech.overlap import shared_recordings
from prunesearch.study.config import StudyConfig
from prunesearch.study.progress import print_note
from prunesearch.study.record import read_records
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import annotate, open_study


def check_corpora(config: StudyConfig, note: Callable[[str], None] = print_note) -> None:
    """Read the study's manifests, so that an error in one is reported before anything is created. `note` gets a line for each
    two splits that share recordings. Raises StudyError."""
    for line in shared_recordings({split: load_corpus(config, split) for split in config.data.splits}):
        note(line)


def create_study(config: StudyConfig, storage: BaseStorage, trials: int | None = None, scan_only: bool = False) -> StoredStudy:
    """The study, created if there is none. `trials` sets its budget; without it, the budget never shrinks.

    A study that was aborted continues. A scan (`scan_only`) leaves the budget of an existing study as it is. If the storage is
    new and the run folder has records (the storage was lost), their candidates are queued first: a worker that claims one
    finds its record, and trains nothing.
    """
    space = SearchSpace.of(config, encoder_layers(config))
    stored = open_study(config, storage, space)
    attrs, known = stored.attrs, 0
    if "trials" not in attrs:
        annotate(stored, config, space.named)
        known = _queue_recorded(config, stored, space)
    elif scan_only:
        return stored
    default = max(config.search.trials, attrs.get("trials", 0), known)
    stored.set_attr("trials", default if trials is None else trials)
    if attrs.get("aborted"):
        stored.set_attr("aborted", False)
    return stored


def _queue_recorded(config: StudyConfig, stored: StoredStudy, space: SearchSpace) -> int:
    """Queue the candidates that have a record in the run folder, baselines excepted (they come in any case).

    Returns the number of records. Raises StudyError for a damaged one.
    """
    records = read_records(config.run_folder / "records", config.name)
    named = set(space.named.values())
    for candidate in (r.candidate for r in records):
        params = space.params(candidate)
        is_in_space = space.candidate(params) == candidate and candidate.lora_rank in space.ranks
        if is_in_space and candidate not in named:
            stored.study.enqueue_trial(params, user_attrs={"candidate": candidate.key})
    return len(records)
