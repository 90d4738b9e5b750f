"""The Optuna study: created once, and what makes its records comparable pinned: its definition, code, data and anchor."""

import hashlib
import json
import random
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

import prunesearch
from prunesearch.search.layer_sets import LayerSetSampler
from prunesearch.search.samplers import CandidateSampler, optuna_sampler
from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig
from prunesearch.study.errors import StudyError
from prunesearch.study.importance import Scan
from prunesearch.study.record import write_atomically

CREATE_ATTEMPTS = 5  # of several that create a study at once, some databases refuse all but one


def sampler_of(
    config: StudyConfig, space: SearchSpace, params_of: Callable[[Candidate], float], scan: Scan | None
) -> CandidateSampler:
    """The sampler that the study file names; `params_of` gives a candidate's second objective before it is trained."""
    search = config.search
    scores = scan.score("delta_loss") if scan else None
    if search.sampler == "layer-sets":
        most = search.max_worst_group_wer
        return LayerSetSampler(space, params_of, config.seed, search.startup_trials, scores, most)
    return optuna_sampler(search.sampler, space, config.seed, search.startup_trials, scores)


def open_study(
    config: StudyConfig,
    storage: BaseStorage,
    space: SearchSpace,
    sampler: CandidateSampler | None = None,
    create: bool = True,
) -> optuna.Study:
    """Create the study, or load it and check that it is the same one; without a sampler, it proposes at random.

    Raises StudyError, naming what differs, when the stored study was made from another definition; and where there is none
    and none is to be made.
    """
    sampler = sampler or CandidateSampler(space, config.seed)
    study = _created(config.name, storage, sampler) if create else join_study(config, storage, sampler)
    beside = config.run_folder / "definition.json"  # records and anchor must not be handed to another study either
    stored = study.user_attrs.get("definition") or (beside.read_text(encoding="utf-8") if beside.exists() else None)
    if stored is None:
        write_atomically(beside, json.dumps(config.definition()))
    if "definition" not in study.user_attrs:
        study.set_user_attr("definition", stored or json.dumps(config.definition()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(["dev_wer", config.search.params_objective])
    if stored and (changed := _differences(json.loads(stored), config.definition())):
        raise StudyError(
            [f"{path}: this study was started with {old!r}, the study file now says {new!r}" for path, old, new in changed]
            + ["records of two definitions cannot be compared: put the old value back, or rename the study and its folder"]
        )
    return study


def join_study(config: StudyConfig, storage: BaseStorage, sampler: CandidateSampler | None = None) -> optuna.Study:
    """The study, where somebody has created it. Raises StudyError where nobody has."""
    try:
        return optuna.load_study(study_name=config.name, storage=storage, sampler=sampler)
    except KeyError:
        fix = f"`prunesearch launch {config.source}` creates it"
        raise StudyError([f"the storage holds no study named {config.name}: {fix}"]) from None


def _created(name: str, storage: BaseStorage, sampler: CandidateSampler) -> optuna.Study:
    for attempt in range(CREATE_ATTEMPTS):
        try:
            return optuna.create_study(
                study_name=name, storage=storage, sampler=sampler, directions=["minimize"] * 2, load_if_exists=True
            )
        except (KeyError, optuna.exceptions.OptunaError) as error:
            if attempt + 1 == CREATE_ATTEMPTS:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise StudyError([f"storage.url: no study can be created there ({reason})"]) from error
            time.sleep(random.uniform(0.05, 0.5))
    raise AssertionError("unreachable")


def check_writable(study: optuna.Study) -> None:
    """Raises StudyError where this worker may read the storage, but not write to it: told now, not after a training."""
    try:
        study._storage.set_study_system_attr(study._study_id, "prunesearch:joined", socket.gethostname())
    except (optuna.exceptions.StorageInternalError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StudyError([f"storage.url: the storage can be read, but not written ({reason})"]) from None


def annotate(study: optuna.Study, config: StudyConfig, named: Mapping[str, Candidate]) -> None:
    """What optuna-dashboard shows beside the study, where it is installed."""
    try:
        from optuna_dashboard import save_note
    except ImportError:
        return
    objective = config.search.params_objective
    paragraphs = (
        f"# {config.name}",
        f"Which layers of `{config.encoder.model}` can go in front of `{config.llm.model}`, and which LoRA rank repairs that?",
        f"Dev WER (a fraction) against `{objective}`. A trial's candidate stands in its attribute `candidate`: "
        "`minus-3-4+lora8` is the encoder without layers 3 and 4, with LoRA of rank 8. Evaluated in any case:",
        "\n".join(f"- `{name}`: `{candidate.key}`" for name, candidate in named.items()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        save_note(study, "\n\n".join(paragraphs))


def pin(study: optuna.Study, what: str, value: Mapping[str, Any], adopt: bool = False) -> None:
    """Hold to what the study's first worker had: `value`, under the name `what` (`code`, `data`, `anchor`).

    `adopt`: from now on this one. Raises StudyError, naming what differs.
    """
    stored = study.user_attrs.get(what)
    if stored is None or adopt:
        study.set_user_attr(what, dict(value))
        return
    if changed := _differences(stored, json.loads(json.dumps(value))):
        lines = [f"{what}.{path}: the study has {old!r}, this worker {new!r}" for path, old, new in changed]
        raise StudyError([*lines, f"this worker's {what} would make other records: use the study's, or go on with --adopt"])


def code_identity() -> dict[str, str]:
    """What trains and scores: this package's version and sources, and the libraries that compute."""
    digest = hashlib.sha256()
    package = Path(prunesearch.__file__).parent
    for file in sorted(p for room in ("speech", "model", "training") for p in (package / room).glob("*.py")):
        digest.update(file.read_bytes())
    libraries = {name: version(name) for name in ("torch", "transformers", "peft", "jiwer")}
    return {"prunesearch": prunesearch.__version__, "source": digest.hexdigest()[:12], **libraries}


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}".strip("."))]
    return [] if old == new else [(path, old, new)]
