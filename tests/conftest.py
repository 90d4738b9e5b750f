"""A study of toy size, made on the spot: random weights of real architectures, and tones for speech."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import soundfile

from prunesearch.study.config import StudyConfig, load_study
from tests.servers import Postgres

WORDS = {"low": 220.0, "mid": 440.0, "high": 880.0}
LAYERS = 4


def write_split(folder: Path, split: str, count: int) -> None:
    rng, phases, lines = random.Random(split), random.Random(f"{split} phases"), []
    (folder / split).mkdir(parents=True)
    for i in range(count):
        words = [rng.choice(list(WORDS)) for _ in range(rng.randint(1, 4))]
        t = np.arange(3200) / 16_000
        phase = phases.uniform(0, 2 * np.pi)  # no two recordings are the same
        samples = np.concatenate([np.sin(2 * np.pi * WORDS[w] * t + phase) for w in words]) * 0.5
        soundfile.write(folder / split / f"{i}.wav", samples, 16_000)
        row = {"audio": f"{split}/{i}.wav", "text": " ".join(words), "language": "en", "speaker": rng.choice("ab")}
        lines.append(json.dumps(row))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


def save_models(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(0)
    shape = WhisperConfig(
        d_model=16, encoder_layers=LAYERS, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, max_source_positions=100, vocab_size=300,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperEncoder(shape).save_pretrained(folder / "encoder")
    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(folder / "encoder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "llm")
    llm = LlamaConfig(
        vocab_size=280, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")


STUDY: dict[str, Any] = {
    "encoder": {"model": "encoder"},
    "llm": {"model": "llm"},
    "projector": {"stack": 2, "hidden": 16, "dropout": 0.1},
    "data": {"train": "train.jsonl", "dev": "dev.jsonl", "test": "test.jsonl", "group": "speaker"},
    "anchor": {"steps": 12},
    "training": {"steps": 8, "batch_size": 4, "precision": "fp32", "checkpoint_seconds": 0.0},
    "search": {"max_removed": 2, "lora_ranks": [0, 2, 4], "baseline_lora_rank": 4, "trials": 6, "startup_trials": 2},
}


def as_toml(value: Any) -> str:
    """Tables are written inline, below the top one."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {as_toml(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(as_toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def write_study(folder: Path, toy: Path, **sections: dict[str, Any]) -> Path:
    """A study file in `folder` on the toy's models and data, with keys of some sections replaced."""
    table = {name: dict(section) for name, section in STUDY.items()}
    for name in ("encoder", "llm"):
        table[name]["model"] = str(toy / name)
    for split in ("train", "dev", "test"):
        table["data"][split] = str(toy / f"{split}.jsonl")
    for name, section in sections.items():
        table.setdefault(name, {}).update(section)
    return _written(folder, table)


def write_model_study(folder: Path, toy: Path, checkpoint: Path, **sections: dict[str, Any]) -> Path:
    """A study file in `folder` on a model that is trained already and the toy's data, with keys of some sections replaced."""
    table: dict[str, dict[str, Any]] = {
        "model": {"name": str(checkpoint), "lora_dropout": 0.0},
        "data": {split: str(toy / f"{split}.jsonl") for split in ("train", "dev", "test")},
        "training": {"steps": 6, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3},
        "decoding": {"tokens_per_second": 6.0},
        "search": {"max_removed": 2, "lora_ranks": [0, 2], "baseline_lora_rank": 2, "trials": 8, "startup_trials": 2},
    }
    for name, section in sections.items():
        table.setdefault(name, {}).update(section)
    return _written(folder, table)


def _written(folder: Path, table: dict[str, dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.toml").write_text("".join(f"{k} = {as_toml(v)}\n" for k, v in table.items()))
    return folder / "study.toml"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of toy size."""
    folder = tmp_path_factory.mktemp("toy")
    save_models(folder)
    for split, count in (("train", 24), ("dev", 8), ("test", 6)):
        write_split(folder, split, count)
    return folder


def started_postgres() -> Postgres:
    """A laptop without PostgreSQL skips what needs it."""
    try:
        return Postgres()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = started_postgres()
    yield server
    server.remove()


@pytest.fixture
def config(toy: Path, tmp_path: Path) -> StudyConfig:
    return load_study(write_study(tmp_path / f"study-{random.getrandbits(40):x}", toy))
