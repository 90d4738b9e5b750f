"""Speech-LLMs with an audio tower as the system under search, against transformers' own models."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    MossTranscribeDiarizeProcessor,
    Qwen2AudioProcessor,
    VoxtralProcessor,
)
from transformers.models.qwen3_asr.processing_qwen3_asr import Qwen3ASRProcessor

from prunesearch import AutoAsr, export, launch, plan
from prunesearch.model.families import family_of
from prunesearch.model.families.audio_tower import TowerSystem
from prunesearch.model.system import GenerationLimits
from prunesearch.speech.audio import read_audio
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.model_config import ModelConfig
from prunesearch.study.record import read_records, read_utterances
from prunesearch.training.context import TrainingContext
from tests.conftest import write_model_study
from tests.speech_models import TOWERS, save_qwen3_asr


def ask(processor: Any, samples: Sequence[np.ndarray], language: str | None) -> Any:
    """The inputs for a batch, as the family's documentation shows them."""
    if isinstance(processor, Qwen2AudioProcessor):
        said = [{"type": "audio", "audio_url": "x.wav"}, {"type": "text", "text": "Transcribe the speech."}]
        text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        options: dict[str, Any] = {"sampling_rate": 16000, "return_tensors": "pt", "padding": True, "padding_side": "left"}
        return processor(text=[text] * len(samples), audio=[*samples], **options)
    if isinstance(processor, VoxtralProcessor):
        code = {"English": "en", "Danish": "da"}.get(str(language), language)
        return processor.apply_transcription_request(
            [*samples], model_id="voxtral", language=code, format="WAV", sampling_rate=16000
        )
    options = {"language": language} if isinstance(processor, Qwen3ASRProcessor) else {}
    if isinstance(processor, MossTranscribeDiarizeProcessor):
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    return processor.apply_transcription_request([*samples], **options)


def train(folder: Path, toy: Path, steps: int = 200) -> None:
    """Train the model of a folder on the toy's tones, with transformers alone, until it transcribes most of them."""
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder).train(), AutoProcessor.from_pretrained(folder)
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    samples, end = [read_audio(toy / row["audio"]) for row in rows], processor.tokenizer.eos_token_id
    asked = ask(processor, samples, "English")
    is_moss = isinstance(processor, MossTranscribeDiarizeProcessor)
    said = [row["text"] for row in rows]
    if is_moss:
        said = [f"[0.00][S01]{text}[{len(s) / 16000:.2f}]" for text, s in zip(said, samples, strict=True)]
    texts = [[*processor.tokenizer(text).input_ids, end] for text in said]
    width = max(map(len, texts))
    written = torch.tensor([[*text, *[end] * (width - len(text))] for text in texts])
    inside = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    ids, mask = torch.cat([asked["input_ids"], written], 1), torch.cat([asked["attention_mask"], inside], 1)
    audio = {name: value for name, value in asked.items() if name not in ("input_ids", "attention_mask")}
    if isinstance(processor, VoxtralProcessor):  # its windows of 30 s are slow: the tower stays random
        with torch.no_grad():
            states = model.model.audio_tower(audio["input_features"], return_dict=True)
        model.model.audio_tower.forward = lambda *_, **__: states
    labels = written.masked_fill(inside == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=mask, **audio).logits[:, -width - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)


def trained(family: str, toy: Path, folder: Path) -> Path:
    TOWERS[family](folder)
    train(folder, toy)
    return folder


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of each family."""
    return trained(request.param, toy, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    save_qwen3_asr(folder)
    return folder


def recordings(toy: Path) -> list[np.ndarray]:
    """Five; the last two are longer than a chunk of the tower, and longer than a window of its attention."""
    tones = [read_audio(toy / "dev" / f"{i}.wav") for i in range(8)]
    return [tones[0], tones[1], tones[2], np.concatenate(tones[:3]), np.concatenate(tones[:5])]


def loaded(folder: Path) -> TowerSystem:
    return TowerSystem.from_source(str(folder), ModelConfig(name=str(folder)), torch.float32)


def batch(system: TowerSystem, samples: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, padded with zeros, and frames."""
    features = [system.encoder.features(s, torch.device("cpu")) for s in samples]
    frames = torch.tensor([f.shape[-1] for f in features])
    return torch.stack([torch.nn.functional.pad(f, (0, int(frames.max()) - f.shape[-1])) for f in features]), frames


def written(
    system: TowerSystem, samples: Sequence[np.ndarray], languages: list[str | None], removed: tuple[int, ...] = ()
) -> list[list[int]]:
    states, lengths = system.encoder.without(removed).encode(*batch(system, samples))
    with system.reader(system.new_projector(0)) as reader:
        rows = reader.generate(states, lengths, languages, GenerationLimits([8] * len(samples)))
        return [_cut(row, reader.ends) for row in rows]


def own_generate(folder: Path, sample: np.ndarray, language: str | None) -> list[int]:
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    asked = ask(processor, [sample], language)
    row = model.generate(**asked, max_new_tokens=8)[0, asked["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return _cut(row, [ends] if isinstance(ends, int) else ends)


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@torch.no_grad()
def test_removing_nothing_is_the_models_own_generate_token_by_token(tower: Path, toy: Path) -> None:
    system, samples = loaded(tower), recordings(toy)
    for language in ("en", "Danish", None):
        own = [own_generate(tower, sample, language) for sample in samples]
        assert [written(system, [sample], [language])[0] for sample in samples] == own
        assert written(system, samples, [language] * 5) == own, "in a batch"
    assert len({tuple(row) for row in own}) > 1, "the model says different things"


@torch.no_grad()
def test_states_and_logits_at_batch_one_are_the_models_own(tower: Path, toy: Path) -> None:
    system = loaded(tower)
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(tower).eval(), AutoProcessor.from_pretrained(tower)
    for sample in recordings(toy):
        asked = ask(processor, [sample], "en")
        states, lengths = system.encoder.encode(*batch(system, [sample]))
        assert states.shape[1] == int(lengths[0])
        if not system.ways.averages:
            audio = {name: value for name, value in asked.items() if name not in ("input_ids", "attention_mask")}
            own_states = model.model.get_audio_features(**audio).last_hidden_state
            own_states = own_states.reshape(-1, own_states.shape[-1])
            assert torch.equal(states[0], own_states[: int(lengths[0])]), "what is read of the window"
        target = system.target("low high", "en")
        ids = torch.cat([asked["input_ids"], torch.tensor([target.tokens])], 1)
        own = model(**{**asked, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[
            :, -len(target.tokens) - 1 : -1
        ]
        with system.reader(system.new_projector(0)) as reader:
            ours = reader.logits(states, lengths, torch.tensor([target.tokens]), ["en"])
            torch.testing.assert_close(ours, own, atol=2e-5, rtol=1e-4)
            loss = torch.nn.functional.cross_entropy(own[0], torch.tensor(target.tokens))
            assert reader.loss(states, lengths, [target]).item() == pytest.approx(loss.item(), rel=1e-4)


@torch.no_grad()
def test_removing_layers_equals_deleting_them_by_hand(tower: Path, toy: Path, tmp_path: Path) -> None:
    whole = AutoModelForSeq2SeqLM.from_pretrained(tower)
    settings = whole.config.to_dict()
    depth = "encoder_layers" if "encoder_layers" in settings["audio_config"] else "num_hidden_layers"
    settings["audio_config"][depth] = 2
    pruned = type(whole)(type(whole.config).from_dict(settings))
    state = {n: t for n, t in whole.state_dict().items() if ".audio_tower.layers." not in n}
    for new, old in enumerate((0, 3)):
        prefix = f"audio_tower.layers.{old}."
        state |= {n.replace(prefix, f"audio_tower.layers.{new}."): t for n, t in whole.state_dict().items() if prefix in n}
    pruned.load_state_dict(state)
    shutil.copytree(tower, tmp_path / "pruned")
    pruned.generation_config = whole.generation_config
    pruned.save_pretrained(tmp_path / "pruned")
    system = loaded(tower)
    for sample in recordings(toy):
        assert written(system, [sample], ["en"], removed=(1, 2))[0] == own_generate(tmp_path / "pruned", sample, "en")


@torch.no_grad()
def test_a_batch_and_cached_states_change_nothing(tower: Path, toy: Path, tmp_path: Path) -> None:
    file = write_model_study(tmp_path / "s", toy, tower, search={"removable_layers": [2, 3]})
    context = TrainingContext.open(load_study(file))
    encoder, dev = context.pruned_encoder(Candidate((3,))), context.corpora["dev"]
    store = context.encoded(encoder, "dev", context.used("dev"))
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


ALONE = """
import json, re, sys, torch, soundfile
from transformers import AutoModelForSeq2SeqLM, AutoProcessor
folder, manifest, beside = sys.argv[1:]
model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
texts = []
for line in open(manifest):
    row = json.loads(line)
    samples = soundfile.read(manifest.rsplit("/", 1)[0] + "/" + row["audio"], dtype="float32")[0]
    kind, known = model.config.model_type, {"sampling_rate": 16000, "return_tensors": "pt"}
    if kind == "qwen2_audio":
        said = [{"type": "audio", "audio_url": "x.wav"}, {"type": "text", "text": "Transcribe the speech."}]
        text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        asked = processor(text=text, audio=[samples], **known)
    else:
        options = {"qwen3_asr": {"language": "en"}, "moss_transcribe_diarize": {"return_tensors": "pt"}}.get(kind, {})
        if kind == "voxtral":
            options = {"language": "en", "model_id": "voxtral", "format": "WAV", "sampling_rate": 16000}
        asked = processor.apply_transcription_request([samples], **options)
    limit = int(len(samples) / 16000 * 6) + 8 + int(beside)
    ids = model.generate(**asked, max_new_tokens=limit)[:, asked["input_ids"].shape[1]:]
    if kind == "qwen3_asr":
        texts += processor.decode(ids, return_format="transcription_only")
    elif kind == "moss_transcribe_diarize":  # its parser raises on what is no segment
        written = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts += [" ".join(re.sub(r"\\[(S?[\\d.:]+\\]|[S\\d.:]*$)", " ", text).split()) for text in written]
    elif kind in ("qwen2_audio", "voxtral"):
        texts += processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
    else:
        texts += processor.decode(ids, strip_prefix=True, skip_special_tokens=True)
assert not any(name.startswith("prunesearch") for name in sys.modules)
print(json.dumps({"layers": len(model.model.audio_tower.layers), "texts": texts}))
"""


def test_a_study_of_eight_candidates_and_its_export(tower: Path, toy: Path, tmp_path: Path) -> None:
    file = write_model_study(tmp_path / "s", toy, tower)
    launch(file)
    config = load_study(file)
    records = {r.name or r.candidate.key: r for r in read_records(config.run_folder / "records", config.name)}
    assert len(records) == 8
    unpruned, pruned = records["unpruned"], records["top2+lora"]
    assert unpruned.dev is not None
    assert unpruned.dev.errors.wer < 0.5, "the model transcribes"
    model = AutoModelForSeq2SeqLM.from_pretrained(tower)
    assert unpruned.parameters.total == model.num_parameters()
    assert unpruned.parameters.projector == sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    counted = plan(file).named
    assert {name: counted[name] for name in counted} == {name: records[name].parameters for name in counted}
    assert pruned.repair is not None
    system = loaded(tower)
    assert {"1.fc2", f"projector.{system.new_projector(0).entry_name}"} <= {*pruned.repair.ridge}

    export(file, tmp_path / "out", candidate=pruned.candidate.key)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "out"), str(toy / "dev.jsonl"), str(system.format_tokens)],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    trial = read_utterances(config.run_folder / "records", pruned.candidate, "dev")
    assert trial is not None
    assert found == {"layers": 2, "texts": [u.hypothesis for u in trial]}
    own, new = (json.loads((folder / "config.json").read_text()) for folder in (tower, tmp_path / "out"))
    depth = "encoder_layers" if "encoder_layers" in own["audio_config"] else "num_hidden_layers"
    assert (own["audio_config"].pop(depth), new["audio_config"].pop(depth)) == (4, 2)
    assert {k for k in {*own, *new} if own.get(k) != new.get(k)} <= {"dtype", "transformers_version"}
    samples = [read_audio(toy / "dev" / f"{i}.wav") for i in range(8)]
    assert AutoAsr.from_pretrained(tmp_path / "out").transcribe(samples, language="en") == found["texts"]


def test_what_moss_writes_beside_a_text_is_left_out_however_it_is_garbled(toy: Path, tmp_path: Path) -> None:
    TOWERS["moss_transcribe_diarize"](tmp_path)
    system = loaded(tmp_path)
    rows = {
        "[0.00][S01]low high[2.56]": "low high",
        "[0.00][S01]low[1.00][1.00][S02]high[2.56]": "low high",
        "[0.00][S01]low high": "low high",  # cut off
        "[0.00][S01]low[1.00][1.00][S02]hig": "low hig",
        "[0.00][S01]low high[2.5": "low high",
        "[0.00][S01]low [noise] high[1..2]": "low [noise] high",
        "low high": "low high",
        "": "",
    }
    with system.reader(system.new_projector(0)) as reader:
        ids = [system.processor.tokenizer(row).input_ids for row in rows]
        assert reader.texts(ids) == list(rows.values())
        target = system.target("low high", None, 2.56)
        assert system.processor.tokenizer.decode(target.tokens[:-1]) == "[0.00][S01]low high[2.56]"
        assert reader.format_tokens >= len(target.tokens) - 1 - len(system.processor.tokenizer("low high").input_ids)


MISSING = """
import sys
sys.modules["mistral_common"] = None
import torch
from prunesearch.model.families.audio_tower import TowerSystem
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
try:
    TowerSystem.load(load_study(sys.argv[1]), torch.float32)
except StudyError as error:
    print(len(error.lines), error.lines[0])
"""


def test_a_package_that_a_processor_lacks_is_named(toy: Path, tmp_path: Path) -> None:
    TOWERS["voxtral"](tmp_path)
    file = write_model_study(tmp_path / "s", toy, tmp_path)
    done = subprocess.run([sys.executable, "-c", MISSING, str(file)], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"1 model\.name: .*: its processor cannot be asked .*pip install mistral-common.*\n", done.stdout)


@pytest.mark.parametrize(
    ("kind", "reason"), [("granite_speech", "CTC predictions"), ("qwen2_5_omni", "a part of its audio tower")]
)
def test_a_model_that_cannot_lose_layers_is_refused_with_the_reason(toy: Path, tmp_path: Path, kind: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    config = load_study(write_model_study(tmp_path / "s", toy, tmp_path))
    with pytest.raises(StudyError, match=rf"model\.name: no layers can be removed from a model of type '{kind}': .*{reason}"):
        family_of(config)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({"window_seconds": 2}, r"model\.window_seconds: is for Whisper, got 2"),
        ({"language": "xx"}, r"language 'xx' is not one that .* knows"),
        ({"lora_targets": ["nope"]}, r"model\.lora_targets: .* no layer 'nope'"),
    ],
)
def test_what_a_study_of_a_tower_refuses(qwen: Path, toy: Path, tmp_path: Path, model: dict[str, Any], line: str) -> None:
    rows = [json.loads(text) for text in (toy / "dev.jsonl").open()]
    manifest = tmp_path / "dev.jsonl"
    manifest.write_text("\n".join(json.dumps({"audio": str(toy / r["audio"]), "text": r["text"]}) for r in rows))
    file = write_model_study(tmp_path / "s", toy, qwen, model=model, data={"dev": str(manifest)})  # without languages
    with pytest.raises(StudyError, match=line) as caught:
        _ = TrainingContext.open(load_study(file)).corpora
    assert len(caught.value.lines) == 1
