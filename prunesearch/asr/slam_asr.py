"""An exported speech-LLM, in a folder or on the hub: load it, transcribe with it, save it again.

    asr = SlamAsr.from_pretrained("export")
    asr.transcribe(["a.wav", "b.flac"])

The folder holds `encoder/` (plain Whisper weights and their feature extractor), `projector.safetensors`, `adapter/` (in peft's
format, where there is a LoRA), `llm/` (unless the LLM is only named), `tokenizer/`, and `slam.json` (`Settings`).

Shapes: B batch, M mel bins, F mel frames, T encoder positions, D encoder width.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from prunesearch.asr.parts import (
    PROJECTOR,
    SETTINGS,
    Settings,
    load_base_llm,
    load_encoder_part,
    load_projector,
    local_folder,
    part_states,
    read_settings,
    require_own_parts,
    require_own_tokenizer,
    save_adapter,
    save_base_llm,
    tokenizer_digest,
    with_adapter,
)
from prunesearch.asr.recognizer import Recognizer
from prunesearch.model.digest import sampled_digest
from prunesearch.model.encoder import WhisperLayers
from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.study.files import write_atomically


class SlamAsr(Recognizer):
    """A Whisper encoder, a projector and an LLM."""

    encoder: WhisperLayers
    reader: SpeechLlm
    settings: Settings

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        llm: str | Path | None = None,
    ) -> "SlamAsr":
        """Load a folder that `prunesearch export` wrote, or a hub repository with the same content.

        `device`: default is the first GPU, else the CPU. `llm`: a folder or hub name of the LLM, for a system that was
        exported without it. Only safetensors are read, and no code that comes with a model is run.
        Raises StudyError when the folder is no exported system, or a part of it is missing or cannot be loaded.
        """
        folder = local_folder(source, revision)
        settings = read_settings(folder, source)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        encoder = load_encoder_part(folder, settings)
        base = load_base_llm(folder, source, settings, llm).to(where)
        model = with_adapter(base, folder, settings)
        width = base.model.get_input_embeddings().embedding_dim
        projector = load_projector(folder, settings, encoder.width, width)
        require_own_tokenizer(folder, source, settings)
        states = part_states(encoder, projector, base, model)
        require_own_parts(source, settings, states, llm_is_own=llm is None and (folder / "llm").is_dir())
        reader = SpeechLlm(projector.to(where), base, model)
        return cls(encoder.to(where), reader, settings.without_paths(), where)

    def save_pretrained(self, folder: str | Path, with_llm: bool = True) -> None:
        """Write the system so that `from_pretrained` reads it, without any path of this machine.

        `with_llm=False` writes only the LLM's name (a merged LLM is always written). Raises StudyError where weights are not
        finite.
        """
        self._require_finite()
        folder, settings = Path(folder), self.settings.without_paths()
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.module.save_pretrained(folder / "encoder")
        self.encoder.extractor.save_pretrained(folder / "encoder")
        weights = {name: p.detach().cpu().contiguous() for name, p in self.reader.projector.state_dict().items()}
        save_file(weights, folder / PROJECTOR)
        self.reader.llm.tokenizer.save_pretrained(folder / "tokenizer")
        if isinstance(self.reader.model, PeftModel):
            save_adapter(self.reader.model, folder / "adapter", settings.llm.model)
        if with_llm or settings.merged:
            save_base_llm(self.reader.model, folder / "llm")
        states = self._states()
        digests = {part: sampled_digest(state) for part, state in states.items()}
        settings = settings.model_copy(update={"parts": digests | tokenizer_digest(folder)})
        write_atomically(folder / SETTINGS, settings.model_dump_json(indent=1) + "\n")

    def _states(self) -> dict[str, Mapping[str, torch.Tensor]]:
        return part_states(self.encoder, self.reader.projector, self.reader.llm, self.reader.model)

    def push_to_hub(self, repo_id: str, private: bool | None = None, **kwargs: Any) -> Any:
        """Save, and upload as one commit, as transformers' models do. `kwargs` go to `HfApi.upload_folder`."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs)
