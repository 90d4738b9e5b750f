"""Train the front and the baselines again, for more steps and from several seeds, to check what the short runs predicted.

A confirmation is a study of its own in the study's `run/confirm/`. Its file is written here; then the commands launch, worker,
status and report work on it as on any study. `report.confirmation` compares the two studies.
"""

from pathlib import Path
from typing import Any, Literal

import tomli_w

from prunesearch.commands.launch import launch
from prunesearch.report.confirmation import confirmation_file
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import SPLITS, StudyConfig, TrainingConfig, load_study
from prunesearch.study.files import write_atomically
from prunesearch.study.front import baseline_and_front_systems, complete_records
from prunesearch.study.model_config import KEYS
from prunesearch.study.progress import ProgressListener
from prunesearch.workers.artifacts import open_artifacts
from prunesearch.workers.final_test import fetch_records

STEPS_FACTOR = 5  # steps of a long run, by default, for each step of a short run

Init = Literal["anchor", "scratch"]


def confirm(
    source: str | Path,
    seeds: int = 3,
    steps: int | None = None,
    init: Init | None = None,
    workers: int = 1,
    storage: str | None = None,
    listener: ProgressListener | None = None,
) -> StudyConfig:
    """Train the front and the baselines again, `seeds` times each, and return the confirmation's own study.

    `steps`: of each training; default: five times the search's, or 500 if that does
    not train. `init`: the projectors' start; default: as in the search. The
    study can be resumed and distributed like any other. A confirmation that exists already keeps its file: its seeds, steps and
    systems do not change. Raises StudyError for errors in the user's input.
    """
    config = load_study(source)
    fetch_records(config, storage)
    file = confirmation_file(config)
    if not file.exists():
        write_confirmation(config, seeds, steps, init)
    _copy_anchor(config, load_study(file))
    return launch(file, workers, None, storage, listener)


def write_confirmation(config: StudyConfig, seeds: int, steps: int | None, init: Init | None) -> None:
    """Write the confirmation's study file: all systems of the front and all baselines, each to be trained `seeds` times.

    Raises StudyError if the study has no complete candidate yet.
    """
    complete = complete_records(config)
    systems = baseline_and_front_systems(config, complete)
    again = [Candidate(c.removed_layers, c.lora_rank, repeat) for repeat in range(seeds) for c in systems]
    table = _standalone(config)
    table["name"] = f"{config.name}-confirm"
    short = config.training.steps or TrainingConfig().steps  # a study without training is confirmed by training
    table["training"] |= {"steps": steps or STEPS_FACTOR * short, "rungs": []}
    if init == "scratch" and config.training.repair == "projector":
        table["training"]["repair"] = "none"  # a projector from random weights has nothing to restore
    if init:
        table["training"]["init"] = init
    fixed = [{"removed_layers": list(c.removed_layers), "lora_rank": c.lora_rank, "repeat": c.repeat} for c in again]
    table["search"] |= {"fixed": fixed, "trials": len(again), "scan": False, "sampler": "random", "repeats": seeds - 1}
    write_atomically(confirmation_file(config), tomli_w.dumps(_without_none(table)))


def _standalone(config: StudyConfig) -> dict[str, Any]:
    """The study's settings with absolute paths, so that they are valid in a file of another folder."""
    unused = {"projector", "anchor"} if config.model else set()
    table = config.model_dump(mode="json", exclude={"preset", *unused})
    for section, key in (KEYS[type(part)].split(".") for part in config.models.values()):
        table[section][key] = _absolute(config, table[section][key])
    for split in SPLITS:
        table["data"][split] = [_source(config, s) for s in table["data"][split]]
    if config.artifacts and "://" not in config.artifacts:
        table["storage"]["artifacts"] = str(Path(config.artifacts).resolve())
    return table


def _source(config: StudyConfig, source: Any) -> Any:
    if isinstance(source, str):
        return _absolute(config, source)
    keys = ("common_voice", "dataset")
    return {k: _absolute(config, v) if k in keys else v for k, v in source.items()}


def _absolute(config: StudyConfig, value: str) -> str:
    located = config.locate(value)
    return str(Path(located).resolve()) if Path(located).exists() else located


def _without_none(value: Any) -> Any:
    """Drop keys without a value: TOML has no null, and a missing key means the same."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _copy_anchor(config: StudyConfig, confirmation: StudyConfig) -> None:
    """Give the search's anchor to the confirmation, which would otherwise train the same weights again."""
    if confirmation.training.init != "anchor":
        return
    names = "anchor/anchor.json", "anchor/projector.safetensors"  # the weights last: if they are there, all is
    source, target = open_artifacts(config), open_artifacts(confirmation)
    for name in names:
        if source:
            source.fetch(name)
        ours, theirs = config.run_folder / name, confirmation.run_folder / name
        if ours.exists() and not theirs.exists():
            write_atomically(theirs, ours.read_bytes())
        if target:
            target.put(name)
