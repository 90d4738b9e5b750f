"""The model card of an export, and its record for other machines: both without any path of this machine."""

import os
from pathlib import Path
from typing import Any

from prunesearch.model.families import family_of
from prunesearch.model.hub import name_without_path
from prunesearch.study.config import SPLITS, StudyConfig
from prunesearch.study.model_config import KEYS, ModelConfig
from prunesearch.study.record import RunRecord
from prunesearch.study.sources import CommonVoiceSource, FleursSource, Source

ERROR_KINDS = ("substitutions", "deletions", "insertions", "reference_words")


def model_card(config: StudyConfig, record: RunRecord, merged: bool, llm_missing: bool) -> str:
    """A model card: which layers were removed, WER, and training. The licence is left for the user to fill in.

    `merged`: the LoRA is in the LLM's weights. `llm_missing`: the LLM is neither in the export nor on the hub.
    """
    p = record.parameters
    removed = ", ".join(map(str, record.removed_layers)) or "none"
    if config.model is not None:
        return _native_card(config, record, merged, config.model)
    encoder, llm = (name_without_path(config.locate(name)) for name in (config.slam.encoder.model, config.slam.llm.model))
    missing, llm_argument = (" (not part of this folder)", f', llm="/path/to/{llm}"') if llm_missing else ("", "")
    languages = sorted(record.dev.by_language) if record.dev else []
    return f"""---
license: # fill in: it depends on the encoder's, the LLM's and the data's
language: [{", ".join(languages)}]
pipeline_tag: automatic-speech-recognition
tags: [prunesearch, slam-asr]
---

# {config.name}: {record.name or record.candidate.key}

A Whisper encoder with layers removed, a projector, and a language model{" with LoRA" if record.lora_rank else ""}, found by
a search of the kind that [arXiv 2603.27981](https://arxiv.org/abs/2603.27981) suggests, in the study `{config.name}`.

    from prunesearch import SlamAsr
    SlamAsr.from_pretrained("…"{llm_argument}).transcribe(["recording.wav"])

| | |
|---|---|
| encoder | `{encoder}`, {record.encoder_layers} layers, of which removed: {removed} |
| LLM | `{llm}`{missing}, LoRA of rank {record.lora_rank}{", merged into it" if merged else ""} |
| parameters | encoder {p.encoder:,}, projector {p.projector:,}, LoRA {p.lora:,}, LLM {p.llm:,} |
{_how_and_how_well(config, record)}"""


def _native_card(config: StudyConfig, record: RunRecord, merged: bool, model: ModelConfig) -> str:
    """The card of a model of a family that transformers knows."""
    p, name = record.parameters, name_without_path(config.locate(model.name))
    removed = ", ".join(map(str, record.removed_layers)) or "none"
    beside, auto = record.lora_rank and not merged, family_of(config).trained_system().auto_class
    projector = f"projector {p.projector:,}, " if p.projector else ""
    window = f", window shortened to {model.window_seconds} s" if model.window_seconds else ""
    adapter = '\n    model.load_adapter("…/adapter")  # the LoRA is not merged' if beside else ""
    return f"""---
license: # fill in: it depends on {name}'s and the data's
language: [{", ".join(sorted(record.dev.by_language) if record.dev else [])}]
pipeline_tag: automatic-speech-recognition
tags: [prunesearch]
---

# {config.name}: {record.name or record.candidate.key}

{name} with layers of its encoder removed, found in the study `{config.name}`.

    from transformers import {auto}, AutoProcessor
    model, processor = {auto}.from_pretrained("…"), AutoProcessor.from_pretrained("…"){adapter}

| | |
|---|---|
| model | `{name}`{window} |
| encoder | {record.encoder_layers} layers, of which removed: {removed} |
| language model | LoRA of rank {record.lora_rank}{", merged into it" if merged else ""} |
| parameters | encoder {p.encoder:,}, {projector}language model {p.llm:,}, LoRA {p.lora:,} |
{_how_and_how_well(config, record)}"""


def _how_and_how_well(config: StudyConfig, record: RunRecord) -> str:
    """The last rows of the first table, and the table of errors."""
    unit = "characters" if record.rate == "CER" else "words"
    return f"""| repair | {_repair(record)} |
| training | {record.steps} steps of {config.training.batch_size}, {_training(record, config)} |
| data | train {", ".join(data_name(config, source) for source in config.data.train)} |

| split | language | {record.rate}, % | substitutions | deletions | insertions | reference {unit} |
|---|---|---|---|---|---|---|
{_error_rows(record)}

Texts are normalised before they are compared.
"""


def _repair(record: RunRecord) -> str:
    """How far weights were changed before training."""
    if record.repair is None:
        return "none"
    maps = [name for name in record.repair.ridge if not name.startswith("projector")]
    count = f"{len(maps)} linear map{'' if len(maps) == 1 else 's'}"
    layers = f"{count} of the encoder ({', '.join(maps)}) and " if maps else ""
    fitted = f"refitted by least squares on {record.repair.utterances} utterances, without transcripts"
    return f"{layers}the first linear map behind it, {fitted}"


def _training(record: RunRecord, config: StudyConfig) -> str:
    """Seed, start, and how far the weights went from there."""
    kept = "" if record.share is None else f"; kept: {record.share:.0%} of the way to the trained weights"
    return f"seed {record.seed}, from {config.training.init}{kept}"


def _error_rows(record: RunRecord) -> str:
    """One row of the table for each split and each of its languages."""
    rows = []
    for split, result in (("dev", record.dev), ("test", record.test)):
        if result:
            rows += [(split, name, errors) for name, errors in {"all": result.errors, **result.by_language}.items()]
    return "\n".join(
        f"| {split} | {name} | {100 * errors.wer:.2f} | {' | '.join(str(getattr(errors, kind)) for kind in ERROR_KINDS)} |"
        for split, name, errors in rows
    )


def data_name(config: StudyConfig, source: Source) -> str:
    """A short name of a data source, of a local one its base name only."""
    if isinstance(source, str):
        return _file_name(config, source)
    if isinstance(source, CommonVoiceSource):
        return f"Common Voice {_file_name(config, source.common_voice)} ({source.split})"
    if isinstance(source, FleursSource):
        return f"FLEURS {source.fleurs} ({source.split})"
    configuration = f", {source.config}" if source.config else ""
    return f"{name_without_path(config.locate(source.dataset))}{configuration} ({source.split})"


def record_without_paths(config: StudyConfig, record: RunRecord) -> RunRecord:
    """The record with the base names of local models and data in its copy of the study's definition."""
    stored = record.provenance.get("config")
    if not isinstance(stored, dict):
        return record
    definition = dict(stored)
    for section, key in (key.split(".") for key in KEYS.values()):
        if definition.get(section):
            named = name_without_path(config.locate(definition[section][key]))
            definition[section] = {**definition[section], key: named}
    if "data" in definition:
        splits = {split: [_source_without_path(config, s) for s in definition["data"].get(split, [])] for split in SPLITS}
        definition["data"] = {**definition["data"], **splits}
    return record.model_copy(update={"provenance": {**record.provenance, "config": definition}})


def _source_without_path(config: StudyConfig, source: str | dict[str, Any]) -> str | dict[str, Any]:
    """A data source as a record stores it, with base names in the place of paths."""
    if isinstance(source, str):
        return _file_name(config, source)
    if "common_voice" in source:
        return {**source, "common_voice": _file_name(config, source["common_voice"])}
    if "dataset" in source:
        files = source.get("data_files")
        return {
            **source,
            "dataset": name_without_path(config.locate(source["dataset"])),
            "data_files": name_without_path(files) if files else files,
        }
    return source


def _file_name(config: StudyConfig, path: str) -> str:
    """The base name of a path in the study file."""
    return Path(os.path.abspath(config.locate(path))).name
