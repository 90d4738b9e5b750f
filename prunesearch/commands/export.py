"""Export a candidate of a study as a folder that works without the study."""

from pathlib import Path

from prunesearch.asr.assembly import llm_differs, load_candidate
from prunesearch.commands.model_card import model_card, record_without_paths
from prunesearch.model.hub import is_local
from prunesearch.search.study_progress import candidate_key
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.files import whole_or_nothing, write_atomically
from prunesearch.study.front import complete_records, knee, study_front
from prunesearch.study.record import RunRecord, read_record
from prunesearch.training.repair import keep_maps_of
from prunesearch.workers.final_test import fetch_records
from prunesearch.workers.optuna_study import open_existing_study


def export(
    source: str | Path,
    out: str | Path,
    candidate: str | None = None,
    trial: int | None = None,
    best_under_params: float | None = None,
    merge: bool | None = None,
    with_llm: bool | None = None,
    storage: str | None = None,
) -> RunRecord:
    """Write a candidate of the study to the folder `out`, for `AutoAsr.from_pretrained`; returns its record.

    Of a `[model]`, the folder is of the model's own kind, which transformers opens alone. Eight parameters, since a notebook
    calls this with keywords. `candidate`, `trial`, `best_under_params`: see `choose_record`. `merge` adds the LoRA to the LLM's
    weights, which are then written; by default, for a `[model]` only. This may change the last bits of the arithmetic, and so
    a transcript. `with_llm`: whether to write the LLM; by default it is
    written if the study loads it from a folder, and only named if it is on the hub. No file holds a path of this machine.
    Raises StudyError for errors in the user's input.
    """
    config = load_study(source, data_must_exist=False)
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise StudyError([f"--out: {out} exists already and is not empty"])
    fetch_records(config, storage)
    record = choose_record(config, candidate, trial, best_under_params, storage)
    keep_maps_of(config, [record])
    asr = load_candidate(config, record, merge)
    llm_is_local = config.model is None and is_local(config.locate(config.slam.llm.model))
    if (changed := llm_differs(config)) and with_llm is False:
        raise StudyError(["--no-llm: the anchor's LoRA is merged into the LLM, which must be written: leave the option out"])
    with whole_or_nothing(out):
        asr.save_pretrained(out, with_llm=llm_is_local or changed if with_llm is None else with_llm)
        write_atomically(out / "record.json", record_without_paths(config, record).model_dump_json(indent=1) + "\n")
        llm_missing = llm_is_local and not (out / "llm").is_dir()
        write_atomically(out / "README.md", model_card(config, record, asr.settings.merged, llm_missing))
    return record


def choose_record(
    config: StudyConfig,
    candidate: str | None = None,
    trial: int | None = None,
    best_under_params: float | None = None,
    storage: str | None = None,
) -> RunRecord:
    """The complete record of a candidate, chosen by at most one of three arguments; by default, the front's knee.

    `candidate`: its key. `trial`: the number of its Optuna trial, looked up in the study's storage (or in `storage`).
    `best_under_params`: the lowest dev WER on the front with at most so many parameters (the study's objective).
    Raises StudyError where there is no such record, or for more than one argument.
    """
    choices = {"--candidate": candidate, "--trial": trial, "--best-under-params": best_under_params}
    if len(given := [name for name, value in choices.items() if value is not None]) > 1:
        raise StudyError([f"{' and '.join(given)}: choose by one of them"])
    if trial is not None:
        candidate = key_of_trial(config, trial, storage)
    complete = complete_records(config)
    if candidate is not None:
        return _record_of(config, candidate, complete)
    objective = config.search.params_objective
    front = study_front(config, complete)
    if best_under_params is None:
        chosen = knee(front, objective)
    else:
        small = [r for r in front if r.parameters.of(objective) <= best_under_params]
        if not small:
            least = front[0].parameters.of(objective)
            raise StudyError(
                [f"--best-under-params: must be at least {least}, the front's smallest, got {best_under_params:g}"]
            )
        chosen = small[-1]  # the front's WER falls as its parameters rise
    return next(r for r in complete if r.candidate.system == chosen.candidate)


def _record_of(config: StudyConfig, key: str, complete: list[RunRecord]) -> RunRecord:
    """A candidate's record by its key. Raises StudyError where the key is malformed or the record is not complete."""
    try:
        candidate = Candidate.from_key(key)
    except ValueError as error:
        raise StudyError([f"--candidate: {error}"]) from None
    record = read_record(config.run_folder / "records", candidate, config.name)
    if record is None or record.state != "complete":
        front = ", ".join(r.candidate.key for r in study_front(config, complete))
        raise StudyError([f"--candidate: {key} is not complete; the front is {front}"])
    return record


def key_of_trial(config: StudyConfig, number: int, storage: str | None = None) -> str:
    """The key of the candidate that a trial of the study evaluated. Raises StudyError where there is no such trial."""
    keys = {t.number: candidate_key(t) for t in open_existing_study(config, storage).trials()}
    if number not in keys:
        raise StudyError([f"--trial: {config.name} has trials 0 to {max(keys, default=-1)}, got {number}"])
    if (key := keys[number]) is None:
        raise StudyError([f"--trial: must be a trial that has a candidate, got {number}: `prunesearch status` lists the front"])
    return key
