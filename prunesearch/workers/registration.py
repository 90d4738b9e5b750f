"""Creating a study in its storage, with a budget that all of its workers share."""

from optuna.storages import BaseStorage

from prunesearch.model.skeleton import encoder_layers
from prunesearch.search.space import SearchSpace
from prunesearch.speech.corpus import load_corpus
from prunesearch.study.config import StudyConfig
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.optuna_study import annotate, open_study


def check_corpora(config: StudyConfig) -> None:
    """Read the study's manifests, so that an error in one is reported before anything is created. Raises StudyError."""
    for split in config.data.splits:
        load_corpus(config, split)


def create_study(config: StudyConfig, storage: BaseStorage, trials: int | None = None, scan_only: bool = False) -> StoredStudy:
    """The study, created if there is none. `trials` sets its budget; without it, the budget never shrinks.

    A study that was aborted continues. A scan (`scan_only`) leaves the budget of an existing study as it is.
    """
    space = SearchSpace.of(config, encoder_layers(config))
    stored = open_study(config, storage, space)
    attrs = stored.attrs
    if "trials" not in attrs:
        annotate(stored, config, space.named)
    elif scan_only:
        return stored
    stored.set_attr("trials", max(config.search.trials, attrs.get("trials", 0)) if trials is None else trials)
    if attrs.get("aborted"):
        stored.set_attr("aborted", False)
    return stored
