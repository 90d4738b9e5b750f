"""The Optuna study: created once. What makes its records comparable is locked: definition, code, data, models and anchor."""

import hashlib
import json
import socket
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from os.path import expandvars
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

import prunesearch
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.samplers import CandidateSampler, optuna_sampler
from prunesearch.search.space import ParamsOf, SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, completed_definition
from prunesearch.study.errors import StudyError
from prunesearch.study.files import read_json, write_atomically
from prunesearch.study.importance import Scan
from prunesearch.workers.optuna_internals import StoredStudy
from prunesearch.workers.retry import StorageRefused, bounded
from prunesearch.workers.storage import open_storage
from prunesearch.workers.urls import first_line

MOST_NAMES = 5  # of other studies, in a message
CREATE_ATTEMPTS = 5  # when several workers create a study at once, some databases refuse all but one


def sampler_of(config: StudyConfig, space: SearchSpace, params_of: ParamsOf, scan: Scan | None) -> CandidateSampler:
    """The sampler that the study file names. `params_of`: a candidate's second objective, known before it is trained."""
    search = config.search
    scores = scan.increases() if scan else None
    if search.sampler == "layer-sets":
        return LayerSetSampler(space, params_of, config.seed, search.startup_trials, scores, search.max_worst_group_wer)
    return optuna_sampler(search.sampler, space, config.seed, search.startup_trials, scores)


def open_study(
    config: StudyConfig,
    storage: BaseStorage,
    space: SearchSpace,
    sampler: CandidateSampler | None = None,
    create: bool = True,
) -> StoredStudy:
    """Create the study, or load it and check that it has the same definition; without a sampler, it proposes at random.

    Raises StudyError, naming what differs, if the stored study has another definition; and if there is no study and `create` is
    false.
    """
    sampler = sampler or CandidateSampler(space, config.seed)
    copy = config.run_folder / "definition.json"  # the folder's records and anchor belong to one definition, too
    if create:
        _check_name(config, copy)
    stored = _created(config.name, storage, sampler) if create else load_stored_study(config, storage, sampler)
    locked = stored.attrs.get("definition")
    definition = _definition(locked, config) if locked else _copied_definition(copy)
    if definition is None:
        write_atomically(copy, json.dumps(config.definition()))
    if locked is None:
        stored.set_attr("definition", json.dumps(definition or config.definition()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            stored.study.set_metric_names(["dev_wer", config.search.params_objective])
    if definition and (changed := _differences(completed_definition(definition), config.definition())):
        raise StudyError(
            [f"{path}: this study was started with {old!r}, the study file now says {new!r}" for path, old, new in changed]
            + ["records of two definitions cannot be compared: restore the old values, or rename the study and its folder"]
        )
    return stored


def _copied_definition(copy: Path) -> dict[str, Any] | None:
    """The definition in the run folder; None if there is none. Raises StudyError for a damaged file."""
    if not copy.exists():
        return None
    return read_json(copy, dict[str, Any], "restore it from a copy, or delete it: it is written again from the study file")


def _definition(locked: str, config: StudyConfig) -> dict[str, Any]:
    """The definition in the study's storage. Raises StudyError for a damaged one."""
    try:
        found = json.loads(locked)
        if isinstance(found, dict):
            return found
    except (ValueError, TypeError):
        pass
    raise StudyError([f"the definition of {config.name} in its storage is damaged: restore the storage from a copy"])


def _check_name(config: StudyConfig, copy: Path) -> None:
    """Raises StudyError for the run folder of a study of another name: its folder was renamed or copied.

    A damaged definition is named later, if the storage has none.
    """
    try:
        name = (_copied_definition(copy) or {}).get("name", config.name)
    except StudyError:
        return
    if name != config.name:
        folder = config.run_folder
        fix = f"add name = {json.dumps(name)} to {config.source} to continue that study, or move {folder} away to start anew"
        raise StudyError([f"name: {folder} belongs to the study {name}, this study is {config.name}: {fix}"])


def load_stored_study(config: StudyConfig, storage: BaseStorage, sampler: CandidateSampler | None = None) -> StoredStudy:
    """The study, if it was created. Raises StudyError if it was not."""
    try:
        return StoredStudy(optuna.load_study(study_name=config.name, storage=storage, sampler=sampler), storage)
    except KeyError:
        fix = f"`prunesearch launch {config.source}` creates it"
        names = sorted(study.study_name for study in storage.get_all_studies() if "definition" in study.user_attrs)
        if names and config.name not in names:
            listed = ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")
            older = json.dumps(names[0]) if len(names) == 1 else "its older name"
            fix = f"it holds {listed}; if the study was renamed, add name = {older} to {config.source}; else {fix}"
        raise StudyError([f"the storage holds no study named {config.name}: {fix}"]) from None


def open_existing_study(config: StudyConfig, url: str | None = None) -> StoredStudy:
    """The study of a study file, wherever `launch` put it. Creates nothing. Raises StudyError for a study that was not
    launched.

    `url`: a storage other than the study file's.
    """
    url = url or config.storage.url
    file = _storage_file(config, url)
    if file is not None and not file.exists():
        raise StudyError([f"{config.name} has not been launched yet: `prunesearch launch {config.source}`"])
    return load_stored_study(config, open_storage(url, config.run_folder))


def _storage_file(config: StudyConfig, url: str | None) -> Path | None:
    """The file that a journal or SQLite URL names, variables filled in; None for a server."""
    if url is None:
        return config.run_folder / "journal.log"
    filled = expandvars(url)
    if filled.startswith("journal://"):
        return Path(filled.removeprefix("journal://"))
    path = filled.partition(":///")[2].partition("?")[0]
    return Path(path) if filled.startswith("sqlite") and path else None


def _created(name: str, storage: BaseStorage, sampler: CandidateSampler) -> StoredStudy:
    attempt = bounded(CREATE_ATTEMPTS, lambda e: isinstance(e, (KeyError, optuna.exceptions.OptunaError)), longest_wait=1)
    try:
        study = attempt(
            optuna.create_study,
            study_name=name, storage=storage, sampler=sampler, directions=["minimize"] * 2, load_if_exists=True,
        )  # fmt: skip
    except (KeyError, optuna.exceptions.OptunaError) as error:
        raise StudyError([f"storage.url: no study can be created there ({first_line(error)})"]) from error
    return StoredStudy(study, storage)


def check_writable(stored: StoredStudy) -> None:
    """Raises StudyError if this worker may read the storage but not write to it: now, and not after a training."""
    try:
        stored.write_mark("prunesearch:joined", socket.gethostname())
    except (optuna.exceptions.StorageInternalError, StorageRefused, OSError) as error:
        raise StudyError([f"storage.url: the storage can be read, but not written ({first_line(error)})"]) from None


def annotate(stored: StoredStudy, config: StudyConfig, named: Mapping[str, Candidate]) -> None:
    """Write a note for optuna-dashboard, if it is installed."""
    try:
        from optuna_dashboard import save_note
    except ImportError:
        return
    objective, names = config.search.params_objective, [f"`{part.source}`" for part in config.models.values()]
    paragraphs = (
        f"# {config.name}",
        f"Which encoder layers can {' with '.join(names)} do without, and which LoRA rank repairs that?",
        f"Dev WER (a fraction) against `{objective}`. The attribute `candidate` of a trial names its candidate: "
        "`minus-3-4+lora8` is the encoder without layers 3 and 4, with LoRA of rank 8. These are evaluated in any case:",
        "\n".join(f"- `{name}`: `{candidate.key}`" for name, candidate in named.items()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        save_note(stored.study, "\n\n".join(paragraphs))


def lock_provenance(stored: StoredStudy, what: str, value: Mapping[str, Any], allow_changes: bool = False) -> None:
    """Lock the study to its first worker's `value` of `what`: `code`, `data`, `models` or `anchor`.

    With `allow_changes`, the study is locked to this worker's value from now on. Raises StudyError, naming what differs.
    """
    locked = stored.attrs.get(what)
    if locked is None or allow_changes:
        stored.set_attr(what, dict(value))
        return
    if changed := _differences(locked, json.loads(json.dumps(value))):
        lines = [f"{what}.{path}: the study has {old!r}, this worker {new!r}" for path, old, new in changed]
        fix = "use what the study was started with, or continue with --allow-changes"
        raise StudyError([*lines, f"records made with other {what} cannot be compared: {fix}"])


def code_identity() -> dict[str, str]:
    """The code that trains and scores: versions of this package and of the libraries it computes with, and a source digest."""
    digest = hashlib.sha256()
    package = Path(prunesearch.__file__).parent
    for file in sorted(p for room in ("speech", "model", "training") for p in (package / room).rglob("*.py")):
        digest.update(file.read_bytes())
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "jiwer")}
    return {"prunesearch": prunesearch.__version__, "source": digest.hexdigest()[:12], **libraries}


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}".strip("."))]
    return [] if old == new else [(path, old, new)]
