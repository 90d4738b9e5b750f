"""prunesearch: find the smallest speech encoder a speech-LLM can live with.

    study.toml -> StudyConfig -> study -> Candidate -> model -> short fine-tune -> RunRecord -> front -> report

`candidate`, `config` and `record` hold the nouns; `speech` and `model` the system under search; `training` turns a
candidate into a record; `search` proposes candidates; `report` compares records; `launch` and `plan` put them together.
"""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`SlamAsr`, without importing torch before it is asked for."""
    if name == "SlamAsr":
        return importlib.import_module("prunesearch.asr.slam_asr").SlamAsr
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
