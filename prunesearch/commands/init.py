"""The study file that `prunesearch init` writes."""

import re
from pathlib import Path

from prunesearch.study.errors import StudyError

_TEMPLATE = """\
# A prunesearch study: which encoder layers can go, and which LoRA rank repairs the damage?
# Check it with `prunesearch validate`, see what it costs with `prunesearch plan`. Keys not given have their defaults:
# `prunesearch validate --resolved` prints them all. Paths start at this file; ${{VARIABLES}} are expanded.

name = "{name}"
seed = 0

[encoder]
model = "openai/whisper-small"        # a hub name, or a folder; any Whisper size

[llm]
model = "Qwen/Qwen2.5-0.5B"           # any decoder-only language model
prompt = "Transcribe speech to text.\\n"

[projector]
stack = 5                             # encoder positions per audio embedding
hidden = 2048

[data]                                # JSONL, one utterance a line: {{"audio": "a.wav", "text": "…", "language": "en"}}
train = "data/train.jsonl"
dev = "data/dev.jsonl"                # candidates are chosen on dev,
test = "data/test.jsonl"              # and decoded on test once, at the end
# group = "speaker"                   # a column of the manifest to look at groups by
# max_train_utterances = 5000

[text]
normalizer = "paper"                  # paper | whisper | none

[anchor]                              # the unpruned encoder's projector, trained once; candidates start from it
steps = 1000
learning_rate = 1e-3

[training]                            # what every candidate and every baseline gets
steps = 200
batch_size = 8
learning_rate = 1e-3
rungs = []                            # e.g. [0.5]: after half of the steps, give up what is clearly dominated

[search]
removable_layers = "all"              # or a list of zero-based indices
max_removed = 6
lora_ranks = [0, 4, 8, 16]            # 0: no LoRA
params_objective = "speech_params"    # speech_params | encoder_params | total_params
sampler = "layer-sets"                # layer-sets | tpe | nsga2 | gp | random | grid
# max_worst_group_wer = 0.3           # of data.group: who is worse served than that, is kept off the front
trials = 40                           # candidates in all, the four baselines included
"""


def write_study_file(folder: Path, name: str) -> Path:
    """Write `folder/name/study.toml`. Raises StudyError when there is one, or the name is no file name."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise StudyError([f"a study's name must consist of letters, digits, '-', '_' and '.', got {name!r}"])
    path = folder / name / "study.toml"
    if path.exists():
        raise StudyError([f"{path} exists already: choose another name, or edit it"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEMPLATE.format(name=name), encoding="utf-8")
    return path
