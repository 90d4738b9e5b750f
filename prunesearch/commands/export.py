"""The model out: a candidate of a study as a folder that stands by itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from prunesearch.search.study_progress import candidate_key
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.front import complete_records, knee, pareto_front, pooled_by_system
from prunesearch.study.record import RunRecord, read_record, record_folder, write_atomically
from prunesearch.workers.optuna_study import open_existing_study

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from prunesearch.model.llm import Llm


def chosen(
    config: StudyConfig,
    candidate: str | None = None,
    trial: int | None = None,
    best_under_params: float | None = None,
    storage: str | None = None,
) -> RunRecord:
    """The record to export: a candidate's by key, or by the number of its Optuna trial (looked up in the study's storage);
    the best on dev of at most so many parameters; else the front's knee.

    Raises StudyError where there is none, or where more than one choice is made.
    """
    choices = {"--candidate": candidate, "--trial": trial, "--best-under-params": best_under_params}
    if len(made := [name for name, value in choices.items() if value is not None]) > 1:
        raise StudyError([f"{' and '.join(made)}: choose by one of them"])
    if trial is not None:
        candidate = key_of_trial(config, trial, storage)
    complete = complete_records(config)
    objective = config.search.params_objective
    if candidate is not None:
        try:
            record = read_record(config.run_folder / "records", Candidate.from_key(candidate))
        except ValueError as error:
            raise StudyError([f"--candidate: {error}"]) from None
        if record is None or record.state != "complete":
            some = ", ".join(r.candidate.key for r in pareto_front(complete, objective))
            raise StudyError([f"--candidate: {candidate} is not complete; the front is {some}"])
        return record
    front = pareto_front(pooled_by_system(complete), objective, config.search.max_worst_group_wer)
    if best_under_params is None:
        found = knee(front, objective)
    else:
        small = [r for r in front if r.parameters.of(objective) <= best_under_params]
        if not small:
            least = front[0].parameters.of(objective)
            raise StudyError(
                [f"--best-under-params: must be at least {least}, the front's smallest, got {best_under_params:g}"]
            )
        found = small[-1]  # the front's WER falls as its parameters rise
    return next(r for r in complete if r.candidate.system == found.candidate)


def key_of_trial(config: StudyConfig, number: int, storage: str | None = None) -> str:
    """The key of the candidate that a trial of the study evaluated. Raises StudyError where there is no such trial."""
    keys = {t.number: key for t in open_existing_study(config, storage).trials() if (key := candidate_key(t))}
    if number not in keys:
        raise StudyError([f"--trial: {config.name} has trials 0 to {max(keys, default=-1)}, got {number}"])
    return keys[number]


def export(
    source: str | Path,
    out: str | Path,
    candidate: str | None = None,
    trial: int | None = None,
    best_under_params: float | None = None,
    merge: bool = False,
    with_llm: bool | None = None,
    storage: str | None = None,
) -> RunRecord:
    """Write a candidate of the study to the folder `out`, for `SlamAsr.from_pretrained`; returns its record.

    `merge` adds the LoRA to the LLM's weights, which are then written; it may change a transcript's last bits. `with_llm`
    writes the LLM in any case; by default it is written where the study has it from a folder, and named where it is the
    hub's. Raises StudyError for the user's mistakes.
    """
    config = load_study(source, data_must_exist=False)
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise StudyError([f"--out: {out} exists already and is not empty"])
    record = chosen(config, candidate, trial, best_under_params, storage)
    asr = assembled(config, record, merge)
    local = Path(config.locate(config.llm.model)).is_dir()
    asr.save_pretrained(out, with_llm=local if with_llm is None else with_llm)
    write_atomically(out / "record.json", record.model_dump_json(indent=1) + "\n")
    write_atomically(out / "README.md", card(config, record, asr))
    return record


def weights_file(config: StudyConfig, record: RunRecord) -> Path:
    """Where a record's projector and LoRA lie, if they do."""
    return record_folder(config.run_folder / "records", record.candidate) / "weights.safetensors"


def require_weights(config: StudyConfig, record: RunRecord) -> None:
    """Raises StudyError where the record's weights are not at hand."""
    file = weights_file(config, record)
    if not file.exists():
        raise StudyError(
            [f"{file} is not there: the weights of {record.candidate.key} were deleted, or lie on another machine"]
        )


@dataclass(frozen=True)
class Base:
    """What all candidates of a study stand on. The encoder waits on the CPU: a system takes along the layers that it keeps."""

    encoder: "WhisperEncoder"
    extractor: Any
    llm: "Llm"
    dtype: str
    device: torch.device

    @classmethod
    def load(cls, config: StudyConfig, dtype: str) -> "Base":
        from transformers import AutoFeatureExtractor

        from prunesearch.model.encoder import load_encoder
        from prunesearch.model.llm import load_llm

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        source = config.locate(config.encoder.model)
        encoder = load_encoder(source, config.encoder.revision, getattr(torch, dtype)).requires_grad_(False).eval()
        extractor = AutoFeatureExtractor.from_pretrained(source, revision=config.encoder.revision or "main")
        llm = load_llm(config.locate(config.llm.model), config.llm, getattr(torch, dtype))
        if config.llm.quantization is None:  # bitsandbytes has put its models where they belong
            llm.model.to(device)
        return cls(encoder, extractor, llm, dtype, device)


def dtype_of(record: RunRecord) -> str:
    """What the record's system was computed in."""
    return str(record.provenance.get("dtype", "float32"))


def assembled(config: StudyConfig, record: RunRecord, merge: bool = False) -> Any:
    """The candidate's system, ready to transcribe, from the study's models and the record's weights. Raises StudyError."""
    from prunesearch.model.llm import with_lora

    require_weights(config, record)
    base = Base.load(config, dtype_of(record))
    asr = put_together(config, record, base, with_lora(base.llm, record.lora_rank, config.llm, record.seed))
    if merge and record.lora_rank > 0:
        asr.slam.model = asr.slam.model.merge_and_unload()
        asr.settings = asr.settings.model_copy(update={"merged": True})
    return asr


def put_together(config: StudyConfig, record: RunRecord, base: Base, model: Any) -> Any:
    """The candidate's system on the base's device; `model` is the base's LLM, with a LoRA where the record has one."""
    from prunesearch.asr.slam_asr import Settings, SlamAsr
    from prunesearch.model.encoder import remove_layers
    from prunesearch.model.projector import Projector
    from prunesearch.model.slam import SpeechLlm
    from prunesearch.training.finetune import restore, trainable

    encoder = remove_layers(base.encoder, record.removed_layers).to(base.device)
    own = config.projector
    width = base.llm.model.get_input_embeddings().embedding_dim
    projector = Projector(encoder.config.d_model, width, own.stack, own.hidden, own.dropout).to(base.device)
    slam = SpeechLlm(projector, base.llm, model)
    restore(trainable(slam), load_file(weights_file(config, record)))
    slam.projector.eval()
    model.eval()
    settings = Settings(
        dtype=base.dtype,
        removed_layers=record.removed_layers,
        encoder_layers=record.encoder_layers,
        shared_layers=config.shared_layers(record.encoder_layers),
        lora_rank=record.lora_rank,
        projector=own,
        llm=config.llm.model_copy(update={"model": config.locate(config.llm.model)}),
        decoding=config.decoding,
        text=config.text,
        pad_to_seconds=config.data.pad_to_seconds,
    )
    return SlamAsr(encoder, base.extractor, slam, settings, base.device)


def card(config: StudyConfig, record: RunRecord, asr: Any) -> str:
    """A model card: what was removed, what it costs in WER, what it was trained on. Licences are the user's to fill in."""
    p = record.parameters
    removed = ", ".join(map(str, record.removed_layers)) or "none"
    rows = []
    for split in ("dev", "test"):
        found = getattr(record, split)
        if found:
            rows.append((split, "all", found.errors))
            rows += [(split, language, errors) for language, errors in found.by_language.items()]
    kinds = ("substitutions", "deletions", "insertions", "reference_words")
    errors = "\n".join(
        f"| {split} | {language} | {100 * e.wer:.2f} | {' | '.join(str(getattr(e, kind)) for kind in kinds)} |"
        for split, language, e in rows
    )
    languages = sorted(record.dev.by_language) if record.dev else []
    return f"""---
license: # fill in: it depends on the encoder's, the LLM's and the data's
language: [{", ".join(languages)}]
pipeline_tag: automatic-speech-recognition
tags: [prunesearch, slam-asr]
---

# {config.name}: {record.name or record.candidate.key}

A Whisper encoder with layers removed, a projector, and a language model{" with LoRA" if record.lora_rank else ""}, found by
[prunesearch](https://arxiv.org/abs/2603.27981)'s kind of search in the study `{config.name}`.

    from prunesearch import SlamAsr
    SlamAsr.from_pretrained("…").transcribe(["recording.wav"])

| | |
|---|---|
| encoder | `{config.encoder.model}`, {record.encoder_layers} layers, of which removed: {removed} |
| LLM | `{config.llm.model}`, LoRA of rank {record.lora_rank}{", merged into it" if asr.settings.merged else ""} |
| parameters | encoder {p.encoder:,}, projector {p.projector:,}, LoRA {p.lora:,}, LLM {p.llm:,} |
| training | {record.steps} steps of {config.training.batch_size}, seed {record.seed}, from {config.training.init} |
| data | train {", ".join(map(str, config.data.train))} |

| split | language | WER, % | substitutions | deletions | insertions | reference words |
|---|---|---|---|---|---|---|
{errors}

Texts are normalised before they are compared.
"""
