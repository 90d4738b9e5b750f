"""Whisper itself as the system under search, against transformers' own model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from prunesearch import AutoAsr, export, launch, measure, plan, scan, write_report
from prunesearch.model.families.whisper import CrossAttention, WhisperSystem
from prunesearch.model.llm import lora_parameters
from prunesearch.model.system import GenerationLimits
from prunesearch.speech.audio import read_audio
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import ModelConfig
from prunesearch.study.record import read_records, read_utterances
from prunesearch.training.context import TrainingContext
from prunesearch.training.repair import Repair
from tests.conftest import write_model_study
from tests.speech_models import SPECIAL, save_whisper

ROOT = Path(__file__).parents[1]


def train(folder: Path, toy: Path, steps: int = 250) -> None:
    """Train the model of a folder on the toy's tones, with transformers alone, until it transcribes most of them."""
    model = WhisperForConditionalGeneration.from_pretrained(folder).train()
    processor = WhisperProcessor.from_pretrained(folder)
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    samples = [read_audio(toy / row["audio"]) for row in rows]
    features = processor.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    start = [processor.tokenizer.convert_tokens_to_ids(t) for t in (SPECIAL[1], "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
    end = model.config.eos_token_id
    tokens = [[*start, *processor.tokenizer(f" {row['text']}").input_ids, end] for row in rows]
    width = max(map(len, tokens))
    ids = torch.tensor([[*t, *[end] * (width - len(t))] for t in tokens])
    inside = torch.tensor([[i < len(t) for i in range(width)] for t in tokens])
    labels = ids[:, 1:].masked_fill(~inside[:, 1:], -100)
    labels[:, :3] = -100  # the prompt
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model(input_features=features, decoder_input_ids=ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)


@pytest.fixture(scope="module")
def whisper(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    save_whisper(folder)
    train(folder, toy)
    return folder


def recordings(toy: Path, count: int = 5) -> list[np.ndarray]:
    return [read_audio(toy / "dev" / f"{i}.wav") for i in range(count)]


def loaded(folder: Path, **keys: Any) -> WhisperSystem:
    return WhisperSystem.from_source(str(folder), ModelConfig(name=str(folder), **keys), torch.float32)


def states_of(
    system: WhisperSystem, samples: list[np.ndarray], removed: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.stack([system.encoder.features(s, torch.device("cpu")) for s in samples])
    return system.encoder.without(removed).encode(features, torch.full((len(samples),), features.shape[-1]))


def written(
    system: WhisperSystem, samples: list[np.ndarray], languages: list[str | None], removed: tuple[int, ...] = ()
) -> list[list[int]]:
    states, lengths = states_of(system, samples, removed)
    with system.reader(system.new_projector(0)) as reader:
        rows = reader.generate(states, lengths, languages, GenerationLimits([12] * len(samples)))
    return [row[: row.index(reader.ends[0])] if reader.ends[0] in row else row for row in rows]


def own_generate(folder: Path, samples: list[np.ndarray], **options: Any) -> list[list[int]]:
    model, processor = WhisperForConditionalGeneration.from_pretrained(folder).eval(), WhisperProcessor.from_pretrained(folder)
    features = processor.feature_extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
    rows = model.generate(features, max_new_tokens=12, **options).tolist()
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


# The system


@torch.no_grad()
def test_removing_nothing_is_the_models_own_generate_token_by_token(whisper: Path, toy: Path) -> None:
    samples, languages = recordings(toy), ["en", "da", "en", "en", "da"]
    system = loaded(whisper)
    own = own_generate(whisper, samples, language=languages, task="transcribe")
    assert any(own)
    assert written(system, samples, [*languages]) == own
    assert written(system, samples, [None] * 5) == own_generate(whisper, samples, task="transcribe"), "it finds the language"
    mixed = written(system, samples, ["en", None, "en", None, "English"])
    alone = [written(system, [s], [c])[0] for s, c in zip(samples, ["en", None, "en", None, "en"], strict=True)]
    assert mixed == alone


@torch.no_grad()
def test_logits_at_batch_one_are_the_models_own(whisper: Path, toy: Path) -> None:
    system, samples = loaded(whisper), recordings(toy, 1)
    model = WhisperForConditionalGeneration.from_pretrained(whisper).eval()
    states, lengths = states_of(system, samples)
    target = system.target("low high", "en")
    prompt = system.prompt("en")
    features = system.encoder.features(samples[0], torch.device("cpu"))[None]
    own = model(input_features=features, decoder_input_ids=torch.tensor([[*prompt, *target.tokens[:-1]]])).logits[:, 3:]
    with system.reader(system.new_projector(0)) as reader:
        assert isinstance(reader.projector, CrossAttention)
        assert torch.equal(reader.logits(states, lengths, torch.tensor([target.tokens]), ["en"]), own)
        loss = torch.nn.functional.cross_entropy(own[0], torch.tensor(target.tokens))
        assert reader.loss(states, lengths, [target]).item() == pytest.approx(loss.item(), rel=1e-5)


@torch.no_grad()
def test_removing_layers_equals_deleting_them_by_hand(whisper: Path, toy: Path, tmp_path: Path) -> None:
    whole = WhisperForConditionalGeneration.from_pretrained(whisper)
    pruned = WhisperForConditionalGeneration(WhisperConfig.from_dict(whole.config.to_dict() | {"encoder_layers": 2}))
    kept = {f"encoder.layers.{new}.": f"encoder.layers.{old}." for new, old in enumerate((0, 3))}
    state = {n: t for n, t in whole.state_dict().items() if ".encoder.layers." not in n}
    for new, old in kept.items():
        state |= {n.replace(old, new): t for n, t in whole.state_dict().items() if old in n}
    pruned.load_state_dict(state)
    shutil.copytree(whisper, tmp_path / "pruned")
    pruned.generation_config = whole.generation_config
    pruned.save_pretrained(tmp_path / "pruned")
    samples = recordings(toy)
    expected = own_generate(tmp_path / "pruned", samples, language=["en"] * 5, task="transcribe")
    assert written(loaded(whisper), samples, ["en"] * 5, removed=(1, 2)) == expected


@torch.no_grad()
def test_a_batch_and_cached_states_change_nothing(whisper: Path, toy: Path, tmp_path: Path) -> None:
    file = write_model_study(tmp_path / "s", toy, whisper, search={"removable_layers": [2, 3]})
    context = TrainingContext.open(load_study(file))
    assert context.shared_depth == 1, "the layer below the first removable one is refitted"
    encoder = context.pruned_encoder(Candidate((3,)))
    store, dev = context.encoded(encoder, "dev", context.used("dev")), context.corpora["dev"]
    targets = [context.system.target(u.target, u.language) for u in dev]
    with context.system.reader(context.fresh_projector()) as reader:
        together = reader.loss_sum(*store.batch(range(len(dev)), context.device), targets)
        alone = 0.0
        for i, utterance in enumerate(dev):
            features = encoder.features(read_audio(utterance.audio), context.device)[None]
            direct, lengths = encoder.encode(features, torch.tensor([features.shape[-1]]))
            torch.testing.assert_close(store.batch([i], context.device)[0], direct, atol=1e-5, rtol=1e-4)
            alone += reader.loss_sum(direct, lengths, [targets[i]]).item()
    assert together.item() == pytest.approx(alone, rel=1e-4)


@torch.no_grad()
def test_a_map_behind_the_encoder_folds_into_keys_and_values(whisper: Path, toy: Path) -> None:
    """Whatever constant it adds: a constant of all keys moves no attention."""
    system = loaded(whisper)
    states, lengths = states_of(system, recordings(toy))
    targets = [system.target("low mid", "en")] * 5
    torch.manual_seed(1)
    weight, bias = torch.eye(32) + 0.2 * torch.randn(32, 32), torch.randn(32)
    with system.reader(system.new_projector(0)) as reader:
        expected = reader.loss(states @ weight.T + bias, lengths, targets)
        unmapped = reader.loss(states, lengths, targets)
    projector = system.new_projector(0)
    projector.entry.weight.data, projector.entry.bias.data = weight, bias
    projector.fold()
    with system.reader(projector) as reader:
        folded = reader.loss(states, lengths, targets)
    torch.testing.assert_close(folded, expected, atol=1e-4, rtol=1e-4)
    assert abs(unmapped - expected) > 1e-2
    assert torch.equal(projector.entry.weight, torch.eye(32)), "a second fit starts from the identity"


def test_a_reader_leaves_nothing_behind(whisper: Path, toy: Path) -> None:
    system = loaded(whisper)
    before = {name: tensor.clone() for name, tensor in system.model.state_dict().items()}
    states, lengths = states_of(system, recordings(toy))
    targets = [system.target("low", "en")] * 5
    with system.reader(system.new_projector(0), 2) as reader:
        reader.loss(states.detach(), lengths, targets).backward()
        trained = [*reader.projector.parameters(), *lora_parameters(reader.model).values()]
        assert all(p.grad is not None for p in reader.projector.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(reader.model).values())
        names = {name.split(".lora_")[0].rsplit("layers.", 1)[1] for name in lora_parameters(reader.model)}
        adapted = [
            *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
            "encoder_attn.q_proj",
            "encoder_attn.out_proj",
        ]
        assert names == {f"{layer}.{name}" for layer in (0, 1) for name in adapted}
        with torch.no_grad():
            for p in trained:
                p.add_(0.1)
    after = system.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(p.requires_grad for p in system.model.parameters())


@torch.no_grad()
def test_a_shorter_window_is_a_plain_whisper_with_fewer_positions(whisper: Path, toy: Path, tmp_path: Path) -> None:
    shutil.copytree(whisper, tmp_path / "short")
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    positions = model.model.encoder.embed_positions.weight[:50].clone()
    model.model.encoder.embed_positions = torch.nn.Embedding.from_pretrained(positions)
    model.config.max_source_positions = 50
    model.save_pretrained(tmp_path / "short")
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    WhisperProcessor(extractor, WhisperProcessor.from_pretrained(whisper).tokenizer).save_pretrained(tmp_path / "short")
    samples = [s[:16_000] for s in recordings(toy)]
    expected = own_generate(tmp_path / "short", samples, language=["en"] * 5, task="transcribe")
    assert written(loaded(whisper, window_seconds=1), samples, ["en"] * 5) == expected


def test_an_english_only_model_takes_no_language(toy: Path, tmp_path: Path) -> None:
    save_whisper(tmp_path, is_multilingual=False)
    system = loaded(tmp_path)
    with torch.no_grad():
        assert written(system, recordings(toy), ["en", None, "en", "en", "en"]) == own_generate(tmp_path, recordings(toy))
    assert len(system.prompt("en")) == 2
    with pytest.raises(StudyError, match="knows English only, got recordings in 'da'"):
        system.target("low", "da")


# A study of it


@pytest.fixture(scope="module")
def studied(whisper: Path, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_model_study(tmp_path_factory.mktemp("study") / "s", toy, whisper)
    launch(file)
    return file


def test_a_study_of_eight_candidates_needs_no_anchor(studied: Path, whisper: Path) -> None:
    config = load_study(studied)
    records = read_records(config.run_folder / "records", config.name)
    assert len(records) == 8
    assert {r.state for r in records} == {"complete"}
    assert not (config.run_folder / "anchor").exists()
    by_name = {r.name: r for r in records}
    unpruned = by_name["unpruned"]
    assert unpruned.dev is not None
    assert unpruned.dev.errors.wer < 0.5, "the model transcribes"
    model = WhisperForConditionalGeneration.from_pretrained(whisper)
    assert unpruned.parameters.total == model.num_parameters()
    assert unpruned.parameters.encoder == sum(p.numel() for p in model.model.encoder.parameters())
    pruned = by_name["top2"]
    assert pruned.repair is not None
    assert {"1.fc2", "projector.keys_values"} <= {*pruned.repair.ridge}
    counted = plan(studied).named
    assert {name: counted[name] for name in counted} == {name: by_name[name].parameters for name in counted}
    write_report(config)


ALONE = """
import json, sys, torch, soundfile
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
folder, manifest = sys.argv[1:]
model, processor = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
assert not any(name.startswith("prunesearch") for name in sys.modules)
if len(sys.argv) > 3:
    model.load_adapter(sys.argv[3])
texts = []
for line in open(manifest):
    row = json.loads(line)
    samples = soundfile.read(manifest.rsplit("/", 1)[0] + "/" + row["audio"], dtype="float32")[0]
    inputs = processor(samples, sampling_rate=16000, return_tensors="pt")
    limit = int(len(samples) / 16000 * 6) + 8
    ids = model.generate(inputs.input_features, language="en", task="transcribe", max_new_tokens=limit)
    texts.append(processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
print(json.dumps({"layers": model.config.encoder_layers, "texts": texts}))
"""


@pytest.mark.parametrize("name", ["top2", "top2+lora"])
def test_an_export_opens_with_transformers_alone_and_gives_the_trials_transcripts(
    studied: Path, whisper: Path, toy: Path, tmp_path: Path, name: str
) -> None:
    config = load_study(studied)
    record = next(r for r in read_records(config.run_folder / "records", config.name) if r.name == name)
    export(studied, tmp_path / "out", candidate=record.candidate.key)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(toy / "dev.jsonl")],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    trial = read_utterances(config.run_folder / "records", record.candidate, "dev")
    assert trial is not None
    assert found == {"layers": 2, "texts": [u.hypothesis for u in trial]}
    own, new = (json.loads((folder / "config.json").read_text()) for folder in (whisper, tmp_path / "out"))
    assert {k for k in {*own, *new} if own.get(k) != new.get(k)} <= {"encoder_layers", "dtype", "transformers_version"}
    assert str(whisper) not in "".join(p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix in (".json", ".md"))

    asr = AutoAsr.from_pretrained(tmp_path / "out")
    samples = [read_audio(toy / "dev" / f"{i}.wav") for i in range(8)]
    assert asr.transcribe(samples, language="en") == found["texts"]
    asr.save_pretrained(tmp_path / "again")
    ours, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in ours.items())


def test_a_lora_that_is_not_merged_lies_beside_the_model(studied: Path, toy: Path, tmp_path: Path) -> None:
    key = "minus-2-3+lora2"
    export(studied, tmp_path / "merged", candidate=key)
    export(studied, tmp_path / "beside", candidate=key, merge=False)
    assert (tmp_path / "beside" / "adapter" / "adapter_model.safetensors").exists()
    samples = [read_audio(toy / "dev" / f"{i}.wav") for i in range(8)]
    merged, beside = (AutoAsr.from_pretrained(tmp_path / name) for name in ("merged", "beside"))
    assert beside.transcribe(samples, language="en") == merged.transcribe(samples, language="en")
    states, lengths = beside.encode(*beside.log_mels(samples))
    target = merged.system.target("low mid", "en")  # type: ignore[attr-defined]
    with torch.no_grad():
        losses = [asr.reader.loss(states, lengths, [target] * 8).item() for asr in (merged, beside)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_any_checkpoint_of_the_family_transcribes(whisper: Path, toy: Path) -> None:
    asr = AutoAsr.from_pretrained(whisper)
    truth = [json.loads(line)["text"] for line in (toy / "dev.jsonl").read_text().splitlines()]
    texts = asr.transcribe([toy / "dev" / f"{i}.wav" for i in range(8)], language="en")
    assert sum(a == b for a, b in zip(texts, truth, strict=True)) >= 4
    long = np.concatenate([read_audio(toy / "dev" / f"{i}.wav") for i in range(8)])
    assert len(asr.segments([long], language="en")[0]) > 1, "cut into windows"


def test_a_study_without_training_scans_and_measures(whisper: Path, toy: Path, tmp_path: Path) -> None:
    file = write_model_study(tmp_path / "s", toy, whisper, training={"steps": 0}, search={"trials": 4})
    found = scan(file)
    assert found.unpruned_loss > 0
    assert any(score.repaired_loss is not None for score in found.sets)
    launch(file)
    measured = measure(file, runs=1, utterances=2)
    assert {system.name for system in measured.systems} >= {"unpruned", "top2"}
    assert measured.systems[0].ratios.encoder == 1


def test_repair_brings_the_states_back(whisper: Path, toy: Path, tmp_path: Path) -> None:
    context = TrainingContext.open(load_study(write_model_study(tmp_path / "s", toy, whisper)))
    everyone = context.repair_utterances
    full = context.encoded(context.encoder, "train", everyone).values
    repair = Repair(context, (1,))
    repair.layers()
    repaired, pruned = (context.encoded(e, "train", everyone).values for e in (repair.encoder, context.encoder.without((1,))))
    assert (repaired - full).norm() < 0.7 * (pruned - full).norm()


def test_one_command_makes_a_study_of_a_model_and_one_manifest(whisper: Path, toy: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for split in ("train", "dev", "test") for line in (toy / f"{split}.jsonl").open()]
    rows = [{**row, "audio": str(toy / row["audio"]), "speaker": f"speaker {i % 5}"} for i, row in enumerate(rows)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli(
        "init", "mine", "--in", str(tmp_path), "--model", str(whisper), "--data", str(tmp_path / "all.jsonl"),
    )  # fmt: skip
    assert "by speaker: " in done
    said = cli("validate", str(tmp_path / "mine"))
    assert "whisper with 4 encoder layers" in said
    config = load_study(tmp_path / "mine")
    assert config.data.group == "speaker"
    context = TrainingContext.open(config)
    assert sum(len(context.corpora[split]) for split in ("train", "dev", "test")) == len(rows)


def cli(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "cli.py", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Bad input


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"encoder": {"model": "x/y"}}, r"encoder: must not be given beside \[model\]"),
        ({"anchor": {"steps": 3}}, r"anchor: must not be given beside \[model\], got anchor: the model has its own"),
        ({"training": {"init": "scratch"}}, r"training: init must be anchor with \[model\], got 'scratch'"),
        ({"data": {"pad_to_seconds": 1.0}}, r"data: pad_to_seconds is for \[encoder\], got 1 with \[model\]"),
        ({"model": {"lora_targets": ["nope"]}}, r"model\.lora_targets: .* no layer 'nope'; it has .*q_proj"),
        ({"model": {"window_seconds": 3}}, r"model\.window_seconds: must not exceed 2, .* got 3"),
        ({"model": {"language": "xx"}}, r"language 'xx' is not one that .* knows: da, en"),
        ({"search": {"removable_layers": [4]}}, r"search\.removable_layers: must lie in \[0, 4\), got 4"),
    ],
)
def test_what_a_study_of_a_model_refuses(
    whisper: Path, toy: Path, tmp_path: Path, sections: dict[str, dict[str, Any]], line: str
) -> None:
    with pytest.raises(StudyError, match=line) as caught:
        TrainingContext.open(load_study(write_model_study(tmp_path, toy, whisper, **sections)))
    assert len(caught.value.lines) == 1


def test_a_model_of_no_known_family_is_refused(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    with pytest.raises(StudyError, match=r"model\.name: must be a speech model of a known family \(.*\), got .*'llama'"):
        TrainingContext.open(load_study(write_model_study(tmp_path, toy, tmp_path / "llm")))


def test_an_unknown_or_a_missing_language_is_told_before_training(whisper: Path, toy: Path, tmp_path: Path) -> None:
    for name, language, line in (
        ("a", "xx", "language 'xx' is not one"),
        ("b", None, r"model\.language: the data names no language"),
    ):
        rows = [json.loads(text) | {"audio": str(toy / json.loads(text)["audio"])} for text in (toy / "dev.jsonl").open()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row | {"language": language}) for row in rows))
        file = write_model_study(tmp_path / name, toy, whisper, data={"dev": str(tmp_path / f"{name}.jsonl")})
        with pytest.raises(StudyError, match=line):
            _ = TrainingContext.open(load_study(file)).corpora
