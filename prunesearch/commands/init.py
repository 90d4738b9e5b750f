"""The study file that `prunesearch init` writes."""

import json
from pathlib import Path

from prunesearch.speech.splitting import split_manifest
from prunesearch.study.config import check_study_name
from prunesearch.study.errors import StudyError

_SLAM_ASR = """\
[encoder]
model = "openai/whisper-small"        # a hub name or a folder; any Whisper size with three layers or more

[llm]
model = "Qwen/Qwen2.5-0.5B"           # any decoder-only language model
prompt = "Transcribe speech to text.\\n"

[projector]
stack = 5                             # encoder positions per audio embedding
hidden = 2048                         # width of the hidden layer

"""
_ANCHOR = """\
[anchor]                              # the unpruned encoder's projector, trained once; all candidates start from it
steps = 1000
learning_rate = 1e-3

"""
_MODEL = """\
[model]
name = {model}
# language = "en"                     # spoken in recordings whose data names no language

"""
_NO_GROUP = '# group = "speaker"                  '
_TEMPLATE = """\
# A prunesearch study: which encoder layers can be removed, and which LoRA rank repairs the damage?
# `prunesearch validate` checks this file, `prunesearch plan` estimates the cost. Keys that are not given have defaults:
# `prunesearch validate --resolved` prints all of them. Paths are relative to this file; ${{VARIABLES}} are expanded.

name = "{name}"
seed = 0

{system}\
[data]                                # JSONL, one utterance per line: {{"audio": "a.wav", "text": "…", "language": "en"}}
train = "data/train.jsonl"
dev = "data/dev.jsonl"                # used to choose candidates
test = "data/test.jsonl"              # decoded once, at the end
# group = "speaker"                   # column of the manifest to group results by
# max_train_utterances = 5000
# repair = "data/more.jsonl"          # recordings without transcripts, to fit the repair on; default: train

[text]
normalizer = "paper"                  # paper | whisper | none

{anchor}[training]                            # the same for every candidate and every baseline
repair = "layers"                     # least squares before training: layers | projector | none
steps = 100                           # 0: repair only
batch_size = 8
learning_rate = {rate}                  # small: training starts from a repaired system
rungs = []                            # e.g. [0.5]: after half of the steps, stop candidates that are clearly dominated

[search]
removable_layers = "all"              # or a list of zero-based indices
{most:37} # most layers that a candidate may lose
lora_ranks = [0, 4, 8, 16]            # 0: no LoRA
params_objective = "speech_params"    # speech_params | encoder_params | total_params
sampler = "layer-sets"                # layer-sets | tpe | nsga2 | gp | random | grid
# max_worst_group_wer = 0.3           # exclude candidates from the front whose worst group (of data.group) has a higher dev WER
trials = 40                           # number of candidates, the four baselines included
"""


def write_study_file(folder: Path, name: str, model: str | None = None) -> Path:
    """Write a commented study file, `folder/name/study.toml`, and return its path.

    `model`: a hub name or a folder of a speech model that exists already; without it, the study assembles a SLAM-ASR system.
    Raises StudyError if the file exists, or if the name is not allowed (see `check_study_name`).
    """
    try:
        check_study_name(name)
    except ValueError as error:
        raise StudyError([f"NAME: {error}"]) from None
    path = folder / name / "study.toml"
    if path.exists():
        raise StudyError([f"{path} exists already: choose another name, or edit that file"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if model is None:
        parts = {"system": _SLAM_ASR, "anchor": _ANCHOR, "rate": "3e-4", "most": "max_removed = 6"}
    else:  # its depth is not known yet: the default is half of the layers
        located = str(Path(model).resolve()) if Path(model).is_dir() else model
        system = _MODEL.format(model=json.dumps(located, ensure_ascii=False))
        parts = {"system": system, "anchor": "", "rate": "1e-4", "most": "# max_removed = 6"}
    path.write_text(_TEMPLATE.format(name=name, **parts), encoding="utf-8")
    return path


def write_splits(manifest: Path, study: Path) -> str:
    """Split a manifest into the three that the study file names, and say how. If that fails, the study file is removed.

    Raises StudyError for a manifest that cannot be split.
    """
    try:
        done = split_manifest(manifest, study.parent / "data")
    except StudyError:
        study.unlink()
        raise
    by = "text: the data names no speakers"
    if done.unit != "text":
        by, group = done.unit, f'group = "{done.unit}"'
        study.write_text(study.read_text(encoding="utf-8").replace(_NO_GROUP, f"{group:37}"), encoding="utf-8")
    counts = ", ".join(f"{split} {count}" for split, count in done.utterances.items())
    return f"split {manifest} by {by}: {counts} utterances"
