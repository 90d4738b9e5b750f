"""Damaged model folders: each loads with exactly the weights of the intact one, or is refused in one line that names it.

    python -m tests.fuzz.models --table          the line that each kind of damage gives
    python -m tests.fuzz.models --seconds 60     random damage

The intact folder's tensors, read by safetensors alone, are the oracle. Fields of a configuration that change no shape, such as
the number of attention heads, are left alone: nothing in a checkpoint tells whether they are right.
"""

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from prunesearch.asr.parts import Settings
from prunesearch.asr.slam_asr import SlamAsr
from prunesearch.model.families import family_of
from prunesearch.model.families.audio_tower import TowerSystem
from prunesearch.model.families.slam_asr import SlamSystem, SpeechLlm
from prunesearch.model.families.whisper import WhisperSystem
from prunesearch.model.llm import with_lora
from prunesearch.model.projector import Projector
from prunesearch.model.system import GenerationLimits, TrainedSystem
from prunesearch.study.config import DecodingConfig, StudyConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import LlmConfig, ProjectorConfig
from tests.conftest import save_models, write_model_study, write_split, write_study
from tests.fuzz import FuzzResult
from tests.speech_models import save_qwen3_asr, save_whisper

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 151060136\n"
Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], None]  # of a model's folder, in place


def save_export(models: Path, out: Path, seed: int = 0, rank: int = 2) -> None:
    """An exported system of the toy's models, with an untrained projector and LoRA drawn from `seed`."""
    loaded = SlamSystem.load(load_study(models / "study" / "study.toml"), torch.float32)
    torch.manual_seed(seed)
    llm_config, shape = LlmConfig(model=str(models / "llm")), ProjectorConfig(stack=2, hidden=16, dropout=0.0)
    encoder = loaded.encoder.without((1,))
    projector = Projector.for_models(shape, 16, 16).eval()
    model = with_lora(loaded.llm.model, rank, llm_config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    settings = Settings(
        dtype="float32", removed_layers=(1,), encoder_layers=4, lora_rank=rank, projector=shape, llm=llm_config,
        decoding=DecodingConfig(max_tokens=4),
    )  # fmt: skip
    reader = SpeechLlm(projector, loaded.llm, model.eval())
    SlamAsr(encoder, reader, settings, torch.device("cpu")).save_pretrained(out)


def make_intact(folder: Path) -> None:
    """In `folder`: the toy's `encoder` and `llm`, a study on them, `export` and `other`, exports of different weights, and
    models that exist already: a `whisper` and a `tower`.
    """
    save_models(folder)
    save_whisper(folder / "whisper")
    save_qwen3_asr(folder / "tower")
    for split in ("train", "dev", "test"):
        write_split(folder, split, 1)
    write_study(folder / "study", folder)
    save_export(folder, folder / "export")
    save_export(folder, folder / "other", seed=1)


# Kinds of damage


def of_tensors(change: Callable[[Tensors], Tensors], file: str = WEIGHTS) -> Damage:
    """Damage to the tensors of a file that stays valid safetensors."""

    def damage(folder: Path) -> None:
        tensors = {name: t.clone().contiguous() for name, t in change(load_file(folder / file)).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return damage


def of_json(file: str, **values: object) -> Damage:
    """Damage to keys of a JSON file. The value `...` removes a key."""

    def damage(folder: Path) -> None:
        stored = {**json.loads((folder / file).read_text()), **values}
        (folder / file).write_text(json.dumps({key: value for key, value in stored.items() if value is not ...}))

    return damage


def of_bytes(file: str, change: Callable[[bytes], bytes]) -> Damage:
    """Damage to the bytes of a file."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(change((folder / file).read_bytes()))

    return damage


def removed(name: str) -> Damage:
    """A file or folder that is not there."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def from_other(name: str) -> Damage:
    """A part of the export beside this one in its place."""

    def damage(folder: Path) -> None:
        removed(name)(folder)
        other = folder.parent / "other" / name
        shutil.copytree(other, folder / name) if other.is_dir() else shutil.copy(other, folder / name)

    return damage


def with_adapter(folder: Path) -> None:
    """The adapter of an export, in a model's folder."""
    shutil.copytree(folder.parent / "export" / "adapter", folder, dirs_exist_ok=True)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def in_shards(lost: str | None = None, twice: bool = False) -> Damage:
    """The weights in two files with an index; `lost` is removed, or one tensor lies in both."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        names = sorted(tensors)
        halves = names[: len(names) // 2], names[len(names) // 2 - twice :]
        files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
        places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        (folder / WEIGHTS).unlink()
        if lost:
            (folder / lost).unlink()

    return damage


def without(prefix: str) -> Damage:
    return of_tensors(lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefix)})


def renamed(prefix: str) -> Damage:
    return of_tensors(lambda tensors: {prefix + n: t for n, t in tensors.items()})


def in_config(section: str, **values: object) -> Damage:
    """Damage to keys of a section of config.json."""

    def damage(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        of_json("config.json", **{section: {**stored[section], **values}})(folder)

    return damage


def with_values(name: str, value: float, file: str = WEIGHTS) -> Damage:
    """One value of a tensor replaced."""

    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[0] = value
        return tensors

    return of_tensors(change, file)


HALF = of_bytes(WEIGHTS, lambda content: content[: len(content) // 2])
ENCODER: dict[str, Damage] = {
    "names begin with _orig_mod.": renamed("_orig_mod."),
    "names begin with module.": renamed("module."),
    "config.json: 6 layers, weights of 4": of_json("config.json", encoder_layers=6),
    "config.json: 3 layers, weights of 4": of_json("config.json", encoder_layers=3),
    "no layer_norm": without("layer_norm."),
    "config.json: max_source_positions 200": of_json("config.json", max_source_positions=200),
    "config.json: num_mel_bins 128": of_json("config.json", num_mel_bins=128),
    "config.json: 4 layers as text": of_json("config.json", encoder_layers="4"),
    "config.json: unknown activation": of_json("config.json", activation_function="gelou"),
    "config.json cut": of_bytes("config.json", lambda content: content[:40]),
    "config.json missing": removed("config.json"),
    "weights cut in half": HALF,
    "weights empty": of_bytes(WEIGHTS, lambda content: b""),
    "weights are a git-lfs pointer": of_bytes(WEIGHTS, lambda content: POINTER),
    "weights are a web page": of_bytes(WEIGHTS, lambda content: b"<!DOCTYPE html><html><body>404</body></html>"),
    "bytes behind the weights": of_bytes(WEIGHTS, lambda content: content + b"123"),
    "weights pickled": pickled,
    "shard missing": in_shards(lost="model-00002-of-00002.safetensors"),
    "a tensor in two shards": in_shards(twice=True),
    "a tensor under two names": of_tensors(lambda t: {**t, "encoder.conv1.bias": t["conv1.bias"] + 1}),
    "a tensor more": of_tensors(lambda t: {**t, "layers.0.fc3.weight": torch.zeros(2)}),
    "a tensor transposed": of_tensors(lambda t: {**t, "layers.0.fc1.weight": t["layers.0.fc1.weight"].T}),
    "a tensor of whole numbers": of_tensors(lambda t: {**t, "conv1.bias": t["conv1.bias"].to(torch.int8)}),
    "a NaN": with_values("layers.2.fc1.bias", float("nan")),
    "an infinite value": with_values("layers.2.fc1.bias", float("-inf")),
    "an adapter beside the weights": with_adapter,
    "extractor of 128 mel bins": of_json("preprocessor_config.json", feature_size=128),
    "extractor for 8 kHz": of_json("preprocessor_config.json", sampling_rate=8000),
    "extractor of another kind": of_json("preprocessor_config.json", feature_extractor_type="Wav2Vec2FeatureExtractor"),
    "extractor missing": removed("preprocessor_config.json"),
}
LLM: dict[str, Damage] = {
    "an adapter beside the weights": with_adapter,
    "an adapter in the place of the model": lambda folder: (with_adapter(folder), removed("config.json")(folder))[0],
    "config.json: pad_token_id 280 of 280": of_json("config.json", pad_token_id=280),
    "eos_token_id 280 of 280": lambda folder: (
        of_json("config.json", eos_token_id=280)(folder),
        of_json("tokenizer_config.json", eos_token=None)(folder),
    )[0],
    "vocabulary of 200, tokenizer of 266": lambda folder: (
        of_json("config.json", vocab_size=200)(folder),
        of_tensors(lambda t: {n: w[:200] if len(w) == 280 else w for n, w in t.items()})(folder),
    )[0],
    "a token's id beyond the embedding": of_bytes("tokenizer.json", lambda c: c.replace(b": 265", b": 100265")),
    "config.json: type bert": of_json("config.json", model_type="bert"),
    "config.json: type vit": of_json("config.json", model_type="vit"),
    "config.json: unknown type": of_json("config.json", model_type="nonesuch"),
    "config.json: gptq": of_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "config.json: vocab_size 300": of_json("config.json", vocab_size=300),
    "config.json ties what differs": of_json("config.json", tie_word_embeddings=True),
    "no lm_head": without("lm_head."),
    "a value head": of_tensors(lambda t: {**t, "v_head.summary.weight": torch.zeros(1, 16)}),
    "a NaN": with_values("model.embed_tokens.weight", float("nan")),
    "weights cut in half": HALF,
    "weights pickled": pickled,
    "shard missing": in_shards(lost="model-00001-of-00002.safetensors"),
    "index damaged": lambda folder: (
        in_shards()(folder), of_bytes(f"{WEIGHTS}.index.json", lambda c: c[:50])(folder)
    )[0],
    "tokenizer.json missing": removed("tokenizer.json"),
    "tokenizer.json cut": of_bytes("tokenizer.json", lambda content: content[:500]),
    "tokenizer_config.json cut": of_bytes("tokenizer_config.json", lambda content: content[:20]),
}  # fmt: skip
PROJECTOR, ADAPTER = "projector.safetensors", "adapter/adapter_model.safetensors"
EXPORT: dict[str, Damage] = {
    **{f"{name} missing": removed(name) for name in ("slam.json", "encoder", "tokenizer", PROJECTOR, "adapter", "llm")},
    **{f"{name} missing": removed(name) for name in ("encoder/config.json", f"encoder/{WEIGHTS}", f"llm/{WEIGHTS}", ADAPTER)},
    **{f"{name} missing": removed(name) for name in ("adapter/adapter_config.json", "encoder/preprocessor_config.json")},
    **{f"{name} of another export": from_other(name) for name in (PROJECTOR, "adapter")},
    "slam.json cut": of_bytes("slam.json", lambda content: content[:100]),
    "slam.json with another key": of_json("slam.json", beams=3),
    "slam.json: rank 0": of_json("slam.json", lora_rank=0),
    "slam.json: rank 4": of_json("slam.json", lora_rank=4),
    "slam.json: merged": of_json("slam.json", merged=True),
    "slam.json: two layers removed": of_json("slam.json", removed_layers=[1, 2]),
    "projector cut": of_bytes(PROJECTOR, lambda content: content[:-10]),
    "projector without a tensor": of_tensors(lambda t: {n: w for n, w in t.items() if n != "up.bias"}, PROJECTOR),
    "projector with a NaN": with_values("up.bias", float("nan"), PROJECTOR),
    "adapter cut": of_bytes(ADAPTER, lambda content: content[:-10]),
    "adapter without a tensor": of_tensors(lambda t: dict(list(t.items())[1:]), ADAPTER),
    "adapter with a NaN": of_tensors(lambda t: {n: w * float("nan") for n, w in t.items()}, ADAPTER),
    "adapter of another alpha": of_json("adapter/adapter_config.json", lora_alpha=64),
    "encoder with a NaN": with_values("conv2.bias", float("nan"), f"encoder/{WEIGHTS}"),
    "llm of another export": of_tensors(lambda t: {n: w + 0.1 for n, w in t.items()}, f"llm/{WEIGHTS}"),
}
ANY_MODEL: dict[str, Damage] = {
    "names begin with module.": renamed("module."),
    "config.json: type bert": of_json("config.json", model_type="bert"),
    "config.json: no type": of_json("config.json", model_type=...),
    "config.json cut": of_bytes("config.json", lambda content: content[:40]),
    "config.json missing": removed("config.json"),
    "weights cut in half": HALF,
    "weights missing": removed(WEIGHTS),
    "weights are a git-lfs pointer": of_bytes(WEIGHTS, lambda content: POINTER),
    "weights pickled": pickled,
    "shard missing": in_shards(lost="model-00001-of-00002.safetensors"),
    "a tensor more": of_tensors(lambda t: {**t, "model.more.weight": torch.zeros(2)}),
    "an adapter beside the weights": with_adapter,
    "tokenizer.json missing": removed("tokenizer.json"),
    "tokenizer.json cut": of_bytes("tokenizer.json", lambda content: content[:500]),
    "processor_config.json cut": of_bytes("processor_config.json", lambda content: content[:20]),
    "processor_config.json missing": removed("processor_config.json"),
}
WHISPER: dict[str, Damage] = {
    **ANY_MODEL,
    "config.json: 6 encoder layers, weights of 4": of_json("config.json", encoder_layers=6),
    "config.json: 1 decoder layer, weights of 2": of_json("config.json", decoder_layers=1),
    "config.json: num_mel_bins 128": of_json("config.json", num_mel_bins=128),
    "no decoder": without("model.decoder."),
    "a NaN in the decoder": with_values("model.decoder.layers.0.fc1.bias", float("nan")),
    "a NaN in the encoder": with_values("model.encoder.layers.0.fc1.bias", float("nan")),
    "generation_config.json: no languages": of_json("generation_config.json", lang_to_id=...),
    "generation_config.json cut": of_bytes("generation_config.json", lambda content: content[:20]),
    "generation_config.json missing": removed("generation_config.json"),
}
TOWER: dict[str, Damage] = {
    **ANY_MODEL,
    "config.json: no audio_config": of_json("config.json", audio_config=...),
    "config.json: 6 tower layers, weights of 4": in_config("audio_config", encoder_layers=6),
    "config.json: 3 tower layers, weights of 4": in_config("audio_config", encoder_layers=3),
    "config.json: another audio token": of_json("config.json", audio_token_id=5),
    "config.json: output_dim 16": in_config("audio_config", output_dim=16),
    "no projector": without("model.multi_modal_projector."),
    "no tower": without("model.audio_tower."),
    "a NaN in the tower": with_values("model.audio_tower.layers.0.fc1.bias", float("nan")),
    "a NaN in the projector": with_values("model.multi_modal_projector.linear_1.bias", float("nan")),
    "chat_template.jinja missing": removed("chat_template.jinja"),
    "chat_template.jinja cut": of_bytes("chat_template.jinja", lambda content: content[:100]),
    "chat_template.jinja without the audio": of_bytes("chat_template.jinja", lambda c: c.replace(b"<|audio_pad|>", b"")),
}
DAMAGES = {"encoder": ENCODER, "llm": LLM, "export": EXPORT, "whisper": WHISPER, "tower": TOWER}
TRAINED: dict[str, type[TrainedSystem]] = {"whisper": WhisperSystem, "tower": TowerSystem}


# What must be true


@dataclass(frozen=True)
class Case:
    """A copy of the intact folder that damage may be done to."""

    folder: Path
    config: StudyConfig

    @classmethod
    def copy(cls, intact: Path, to: Path) -> "Case":
        shutil.copytree(intact, to)
        return cls(to, load_study(write_study(to / "study", to)))

    def load(self, part: str) -> dict[str, torch.Tensor]:
        """What a study (or an export's user) loads before anything is trained: the tensors. Raises StudyError."""
        if part == "export":
            asr = SlamAsr.from_pretrained(self.folder / "export")
            asr.decode([np.zeros(16_000, np.float32)])
            return {**asr.encoder.module.state_dict(), **asr.reader.projector.state_dict(), **asr.reader.model.state_dict()}
        if part in TRAINED:
            return self._load_trained(part)
        models = SlamSystem.load(self.config, torch.float32)
        models.digests(self.config)
        module = models.encoder.module if part == "encoder" else models.llm.model
        return dict(module.state_dict())

    def _load_trained(self, part: str) -> dict[str, torch.Tensor]:
        """The tensors of a model that exists already, after its first use."""
        folder = self.folder
        file = write_model_study(folder / f"study-{part}", folder, folder / part, decoding={"max_tokens": 4})
        config = load_study(file)
        family_of(config)
        system = TRAINED[part].load(config, torch.float32)
        system.digests(config)
        features = system.encoder.features(np.zeros(16_000, np.float32), torch.device("cpu"))
        states, lengths = system.encoder.encode(features[None], torch.tensor([features.shape[-1]]))
        with system.reader(system.new_projector(0)) as reader, torch.no_grad():
            reader.loss(states, lengths, [system.target("low", "en")])
            reader.texts(reader.generate(states, lengths, ["en"], GenerationLimits([4])))
            projector = {f"projector.{name}": t for name, t in reader.projector.state_dict().items()}
            return {**system.encoder.module.state_dict(), **projector, **system.model.state_dict()}


def verdict(case: Case, part: str, truth: Tensors) -> str | StudyError:
    """`read`, the one-line error, or what is wrong."""
    try:
        found = case.load(part)
    except StudyError as error:
        whole = "\n".join(error.lines)
        # as the study's key, in the folder's path, or "the exported system"
        names_it = part in whole or (part in TRAINED and "model.name" in whole)
        return error if len(error.lines) == 1 and "\n" not in whole and names_it else f"not one line: {whole!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)
    return "read" if same else "other weights than the intact folder's"


def table() -> list[tuple[str, str, str]]:
    """Part, damage, and the line that it gives."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        intact = Path(scratch) / "intact"
        make_intact(intact)
        truth = {part: Case.copy(intact, Path(scratch) / f"truth-{part}").load(part) for part in DAMAGES}
        for part, damages in DAMAGES.items():
            for n, (name, damage) in enumerate(damages.items()):
                case = Case.copy(intact, Path(scratch) / f"{part}{n}")
                damage(case.folder / part)
                said = str(verdict(case, part, truth[part]))
                rows.append((part, name, said.replace(str(case.folder), "…")))
                shutil.rmtree(case.folder)
    return rows


# Random damage

INTEGERS = {
    "encoder": ("d_model", "encoder_layers", "encoder_ffn_dim", "max_source_positions", "num_mel_bins"),
    "whisper": ("d_model", "encoder_layers", "decoder_layers", "decoder_ffn_dim", "max_target_positions", "vocab_size"),
    "llm": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "pad_token_id"),
}


def random_damage(rng: random.Random, folder: Path, part: str) -> str:
    """Do one random damage to a part's folder; returns what was done."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("README.md", "generation_config.json"))
    weights = [p for p in files if p.suffix == ".safetensors"]
    kind = rng.choice(("cut", "insert", "remove", "tensors", "tensors", "header", "listed", "config"))
    file = rng.choice(weights if kind in ("tensors", "header") else files)
    name = str(file.relative_to(folder))
    content = file.read_bytes()
    if kind == "cut":
        place = rng.randrange(len(content))
        file.write_bytes(content[:place])
        return f"{name} cut at byte {place} of {len(content)}"
    if kind == "insert":
        place = rng.randrange(len(content))
        file.write_bytes(content[:place] + bytes(rng.randrange(256) for _ in range(3)) + content[place:])
        return f"{name} with three bytes inserted at {place}"
    if kind == "remove":
        file.unlink()
        return f"{name} removed"
    if kind == "header":
        place = rng.randrange(8 + int.from_bytes(content[:8], "little"))
        file.write_bytes(content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :])
        return f"{name} with byte {place} of its header replaced"
    if kind == "tensors":
        return f"{name}: {damage_tensors(rng, file)}"
    if kind == "config" and part in INTEGERS:
        key = rng.choice(INTEGERS[part])
        old = json.loads((folder / "config.json").read_text()).get(key, 1)
        value = rng.choice((old + 1, 2 * old + 2, max(old - 1, 0), 0, -1, None, str(old), [old], float(old), ...))
        of_json("config.json", **{key: value})(folder)
        return f"config.json: {key} = {value!r}"
    listed = rng.choice(list(DAMAGES[part]))
    DAMAGES[part][listed](folder)
    return listed


def damage_tensors(rng: random.Random, file: Path) -> str:
    """Drop, rename, double, reshape or cast random tensors of a file, or put values that are no numbers into one."""
    tensors = load_file(file)
    names = rng.sample(sorted(tensors), rng.randint(1, 3))
    kind = rng.choice(("drop", "rename", "double", "reshape", "cut a row", "whole numbers", "nan", "add"))
    for name in names:
        tensor = tensors[name]
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[rng.choice(("_orig_mod.", "model.", "base_model.model.", "x")) + name] = tensors.pop(name)
        elif kind == "double":
            tensors[rng.choice(("encoder.", "model.", "model.encoder.")) + name] = tensor + 1
        elif kind == "reshape":
            tensors[name] = tensor.reshape(-1) if tensor.dim() > 1 else tensor[None]
        elif kind == "cut a row":
            tensors[name] = tensor[:-1]
        elif kind == "whole numbers":
            tensors[name] = tensor.to(rng.choice((torch.int8, torch.int64, torch.uint8, torch.float8_e4m3fn)))
        elif kind == "nan":
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf")))
        else:
            tensors[f"{name}_more"] = tensor
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    return f"{kind} {', '.join(names)}"


def fuzz(seed: int, seconds: float | None = None, count: int | None = None) -> FuzzResult:
    """Damage folders at random until `seconds` have passed or `count` were tried."""
    rng, result, begin = random.Random(seed), FuzzResult(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        intact = Path(scratch) / "intact"
        make_intact(intact)
        truth = {part: Case.copy(intact, Path(scratch) / f"truth-{part}").load(part) for part in DAMAGES}
        while (count is None or result.tried < count) and (seconds is None or time.monotonic() - begin < seconds):
            part = rng.choice(list(DAMAGES))
            case = Case.copy(intact, Path(scratch) / "case")
            done = random_damage(rng, case.folder / part, part)
            found = verdict(case, part, truth[part])
            result.tried += 1
            if isinstance(found, StudyError):
                result.named += 1
            elif found == "read":
                result.read += 1
            else:
                result.wrong.append(f"{part}: {done}: {found}".replace("\n", " ")[:400])
            shutil.rmtree(case.folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="print the line that each kind of damage gives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.table:
        for part, name, said in table():
            print(f"{part}: {name}\n    {said}")
        return
    result = fuzz(arguments.seed, seconds=arguments.seconds)
    print(f"tried {result.tried}, read {result.read}, named {result.named}, wrong {len(result.wrong)}")
    print("\n".join(result.wrong))


if __name__ == "__main__":
    main()
