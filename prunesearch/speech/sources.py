"""Sources of utterances: JSONL manifests, Hugging Face datasets, unpacked Common Voice releases, FLEURS.

A source yields its lines unchanged, as `Row`s. `corpus` applies limits, draws a subset, and normalises texts.
"""

from collections.abc import Iterable
from pathlib import Path

from prunesearch.speech.dataset_rows import read_dataset
from prunesearch.speech.tables import Row, read_common_voice, read_manifest
from prunesearch.study.config import StudyConfig
from prunesearch.study.sources import CommonVoiceSource, DatasetSource, FleursSource, Source

__all__ = ["Row", "read_source"]

FLEURS_CONFIGS = {"da": "da_dk", "nl": "nl_nl", "en": "en_us"}


def read_source(source: Source, config: StudyConfig, transcribed: bool = True) -> Iterable[Row]:
    """The source's rows, in its order. Raises StudyError when there is no such source, or it lacks a column.

    `transcribed`: whether texts are needed. If not, manifests and datasets may do without.
    """
    if isinstance(source, str):
        return read_manifest(Path(config.locate(source)), config.data.group, transcribed)
    if isinstance(source, CommonVoiceSource):
        return read_common_voice(Path(config.locate(source.common_voice)), source, config.data.group)
    if isinstance(source, FleursSource):
        return read_dataset(_fleurs_dataset(source), config, transcribed)
    return read_dataset(source, config, transcribed)


def _fleurs_dataset(source: FleursSource) -> DatasetSource:
    return DatasetSource(
        dataset="google/fleurs",
        split=source.split,
        revision="refs/convert/parquet",
        text="raw_transcription",
        language=source.fleurs,
        data_files=f"{FLEURS_CONFIGS[source.fleurs]}/{source.split}/*.parquet",
    )
