"""Open an exported system of any family."""

from pathlib import Path

import torch

from prunesearch.asr.native import NativeAsr
from prunesearch.asr.parts import SETTINGS as SLAM_SETTINGS
from prunesearch.asr.parts import local_folder
from prunesearch.asr.recognizer import Recognizer
from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.study.errors import StudyError


class AutoAsr:
    """Opens what `prunesearch export` wrote, of whatever family, as transformers' auto classes open models."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        llm: str | Path | None = None,
    ) -> Recognizer:
        """See `SlamAsr.from_pretrained` and `NativeAsr.from_pretrained`. `llm`: for SLAM-ASR systems only.

        Raises StudyError when the source cannot be loaded.
        """
        folder = local_folder(source, revision)
        if (folder / SLAM_SETTINGS).is_file() or not (folder / "config.json").is_file():
            return SlamAsr.from_pretrained(source, revision, device, llm)
        if llm is not None:
            raise StudyError([f"llm: {source} is a whole model, which needs no other LLM: leave llm out"])
        return NativeAsr.from_pretrained(source, revision, device)
