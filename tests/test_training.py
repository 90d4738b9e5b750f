"""The trainer on toy models: caches, resumption, determinism, decoding, outcomes."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prunesearch.model.families.slam_asr import SpeechLlm
from prunesearch.model.llm import recomputes_activations
from prunesearch.speech.audio import read_audio
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import RunRecord, WordErrors, read_record, read_utterances
from prunesearch.training import finetune as tuning
from prunesearch.training import recipe
from prunesearch.training.anchor import anchor_weights, train_anchor
from prunesearch.training.batches import by_length, plan_batches
from prunesearch.training.context import TrainingContext
from prunesearch.training.decode import token_limit
from prunesearch.training.finetune import schedule
from prunesearch.training.recipe import Unmonitored, decode_test, train_and_score
from tests.conftest import write_study


@pytest.fixture
def open_context(toy: Path, tmp_path: Path) -> Callable[..., TrainingContext]:
    def opened(name: str = "s", **sections: dict) -> TrainingContext:
        return TrainingContext.open(load_study(write_study(tmp_path / name, toy, **sections)))

    return opened


def weights(context: TrainingContext, candidate: Candidate) -> dict[str, torch.Tensor]:
    return load_file(context.config.run_folder / "records" / candidate.key / "weights.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_batches_use_all_utterances_equally_and_hold_similar_lengths() -> None:
    lengths = [float((7 * i) % 101) for i in range(101)]
    plan = plan_batches(lengths, 8, steps=26, seed=3)
    assert plan == plan_batches(lengths, 8, 26, 3) != plan_batches(lengths, 8, 26, 4)
    epoch = [i for batch in plan[:13] for i in batch]
    assert sorted(epoch) == list(range(101))
    assert plan[:13] != plan[13:]
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in plan]
    assert max(spread) < 10
    assert by_length([1, 3, 2], 2) == [[1, 2], [0]]


def test_the_learning_rate_warms_up_then_decays_to_its_final_fraction() -> None:
    rates = [schedule(step, 100, 0.05, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[4] == 1
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@torch.no_grad()
def test_cached_states_equal_recomputed_ones(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(search={"removable_layers": [2, 3]}, training={"repair": "none"})
    assert context.shared_depth == 2
    encoder = context.pruned_encoder(Candidate((3,)))
    store = context.encoded(encoder, "dev", context.used("dev"))
    again = context.encoded(encoder, "dev", [5])  # from the cache on disk
    for i, utterance in enumerate(context.corpora["dev"]):
        mel = context.encoder.features(read_audio(utterance.audio), context.device)[None]
        direct, lengths = encoder.encode(mel, torch.tensor([mel.shape[-1]]))
        cached, cached_lengths = store.batch([i], context.device)
        assert torch.equal(lengths, cached_lengths)
        torch.testing.assert_close(cached, direct, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.batch([5], context.device)[0], store.batch([5], context.device)[0], atol=1e-5, rtol=1e-4)
    assert not list((context.config.run_folder / "scratch").iterdir()), "a candidate's states go with it"


def test_only_the_utterances_that_some_step_draws_are_encoded(open_context: Callable[..., TrainingContext]) -> None:
    nothing_else = {"repair": "none", "interpolate": False}
    context = open_context(anchor={"steps": 1}, training={"steps": 2, "batch_size": 3, **nothing_else})
    assert len(context.used("train")) <= 9 < len(context.corpora["train"])
    assert set(context.prefix("train").spans) == set(context.used("train"))


def test_the_same_candidate_gives_the_same_record_and_starts_from_the_anchor(
    open_context: Callable[..., TrainingContext],
) -> None:
    candidate = Candidate((1,), 4)
    first, second = open_context("a"), open_context("b")
    one, two = train_and_score(first, candidate), train_and_score(second, candidate)
    assert {**one.outcome(), "study": ""} == {**two.outcome(), "study": ""}
    assert same(weights(first, candidate), weights(second, candidate))
    assert one.dev is not None
    assert one.parameters.lora > 0
    scratch = open_context("c", training={"init": "scratch"})
    assert train_and_score(scratch, candidate).losses[0] > one.losses[0]
    assert not (scratch.config.run_folder / "anchor").exists()


def test_a_repeat_has_other_batches_and_its_own_record(
    open_context: Callable[..., TrainingContext],
) -> None:
    context = open_context()
    first, again = (train_and_score(context, Candidate((1,), 2, repeat)) for repeat in (0, 1))
    assert again.parameters == first.parameters
    assert (again.seed, again.candidate.key) == (first.seed + 1, "minus-1+lora2@1")
    assert again.losses != first.losses
    assert len(context.budget(1).batches) == len(context.budget().batches)
    assert context.budget(1).batches != context.budget().batches
    tested = decode_test(context, again)
    assert tested.test is not None
    assert read_record(context.config.run_folder / "records", first.candidate) == first


def test_with_rank_zero_only_the_projector_is_trained(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context()
    before = {k: v.clone() for k, v in context.system.llm.model.state_dict().items()}
    record = train_and_score(context, Candidate())
    assert record.parameters.lora == 0
    assert all(name.startswith("projector.") for name in weights(context, Candidate()))
    assert same(before, context.system.llm.model.state_dict())


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_a_killed_trial_resumes_to_the_same_weights(
    open_context: Callable[..., TrainingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = Candidate((0,), 2)
    calm = open_context("calm", training={"rungs": [0.5]})
    expected = train_and_score(calm, candidate)

    killed = open_context("killed", training={"rungs": [0.5]})
    steps_seen: list[int] = []
    seed = tuning.seed_everything

    def kill_at(step: int) -> Callable[[int], None]:
        def counted(value: int) -> None:
            here = value - killed.budget().seed * 1_000_003
            if here == step:
                raise Killed
            steps_seen.append(here)
            seed(value)

        return counted

    train_anchor(killed)
    for step in (3, 6):
        monkeypatch.setattr(tuning, "seed_everything", kill_at(step))
        with pytest.raises(Killed):
            train_and_score(killed, candidate)
    monkeypatch.setattr(tuning, "seed_everything", kill_at(99))
    record = train_and_score(killed, candidate)
    assert steps_seen == list(range(8)), "no step is trained twice when a checkpoint follows each"
    assert {**record.outcome(), "study": ""} == {**expected.outcome(), "study": ""}
    assert same(weights(calm, candidate), weights(killed, candidate))


def test_a_candidate_with_a_record_is_not_trained_again(
    open_context: Callable[..., TrainingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_context()
    record = train_and_score(context, Candidate((2,)))
    monkeypatch.setattr(recipe, "FineTune", lambda *a, **k: pytest.fail("trained twice"))
    assert train_and_score(context, Candidate((2,))) == record


def test_a_batch_that_does_not_fit_is_halved_and_the_steps_stay_the_same(
    open_context: Callable[..., TrainingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = {"projector": {"dropout": 0.0}, "llm": {"lora_dropout": 0.0}}  # masks depend on the shape of what is masked
    expected = train_and_score(open_context("whole", **calm), Candidate((1,), 2))
    whole = SpeechLlm.loss_sum

    def small_memory(self: SpeechLlm, states: torch.Tensor, lengths: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        if len(texts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, states, lengths, texts)

    halved = open_context("halved", **calm)
    train_anchor(halved)
    monkeypatch.setattr(SpeechLlm, "loss_sum", small_memory)
    record = train_and_score(halved, Candidate((1,), 2))
    assert (expected.cost.micro_batch, record.cost.micro_batch) == (4, 1)
    assert record.losses == pytest.approx(expected.losses, abs=1e-4)

    def less_memory(self: SpeechLlm, states: torch.Tensor, lengths: torch.Tensor, texts: list[list[int]]) -> torch.Tensor:
        if len(texts) > 1 or not recomputes_activations(self.llm.model):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, states, lengths, texts)

    tight = open_context("tight", **calm)
    monkeypatch.setattr(SpeechLlm, "loss_sum", whole)
    train_anchor(tight)
    monkeypatch.setattr(SpeechLlm, "loss_sum", less_memory)
    assert train_and_score(tight, Candidate((1,), 2)).losses == pytest.approx(expected.losses, abs=1e-4)

    def no_memory(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SpeechLlm, "loss_sum", no_memory)
    failed = train_and_score(halved, Candidate((2,), 2))
    assert failed.state == "failed"
    assert "out of memory with one utterance at a time" in (failed.reason or "")


def test_recomputed_activations_give_the_same_record(open_context: Callable[..., TrainingContext]) -> None:
    kept = train_and_score(open_context("kept"), Candidate((1,), 2))
    recomputed = train_and_score(open_context("recomputed", training={"gradient_checkpointing": True}), Candidate((1,), 2))
    assert recomputed.losses == pytest.approx(kept.losses, abs=1e-4)
    assert recomputed.dev == kept.dev


def test_the_learning_curve_is_written_beside_the_record(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context()
    record = train_and_score(context, Candidate())
    lines = (context.config.run_folder / "records" / "full" / "curve.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    assert [p["step"] for p in points] == [1, 8]
    assert [round(p["loss"], 6) for p in points] == list(record.losses)
    assert all(p["tokens_per_second"] > 0 and p["memory_bytes"] > 0 and p["learning_rate"] > 0 for p in points)


def test_tracker_tensorboard_writes_the_learning_curve(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(training={"tracker": "tensorboard"})
    record = train_and_score(context, Candidate())
    events = EventAccumulator(str(context.config.run_folder / "tensorboard" / "full"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 8]
    assert [round(event.value, 5) for event in events.Scalars("loss")] == [round(loss, 5) for loss in record.losses]


def test_a_missing_tracker_package_is_reported_before_training(open_context: Callable[..., TrainingContext]) -> None:
    with pytest.raises(StudyError, match=r"training\.tracker: the package trackio is not installed: pip install trackio"):
        open_context(training={"tracker": "trackio"})


def test_an_existing_record_gets_the_baselines_name(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context()
    first = train_and_score(context, Candidate((2, 3)))
    again = train_and_score(context, Candidate((2, 3)), Unmonitored("top2"))
    assert (first.name, again.name) == (None, "top2")
    assert again.model_copy(update={"name": None}) == first
    assert read_record(context.config.run_folder / "records", Candidate((2, 3))) == again
    assert train_and_score(context, Candidate((2, 3)), Unmonitored("minus-2-3")).name == "top2"


def test_divergence_is_recorded_with_its_step(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(training={"learning_rate": 1e30, "clip": 1e30})
    record = train_and_score(context, Candidate((), 2))
    assert record.state == "failed"
    assert record.dev is None
    assert re.match(r"training diverged at step 2 \(loss is nan at step 8\)", record.reason or "")
    assert read_record(context.config.run_folder / "records", Candidate((), 2)) == record


def test_a_diverging_anchor_is_one_error_line_and_leaves_no_file(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(anchor={"learning_rate": 1e30}, training={"clip": 1e30})
    with pytest.raises(StudyError, match=r"anchor\.learning_rate: with 1e\+30, training diverged at step \d+ .*smaller"):
        train_anchor(context)
    assert not anchor_weights(context).exists()


def test_a_rung_can_end_a_trial_and_its_partial_record_is_kept(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(training={"rungs": [0.25, 0.5]})
    seen: list[tuple[int, WordErrors]] = []

    class EndsAtSecond(Unmonitored):
        def ends_at_rung(self, step: int, errors: WordErrors) -> bool:
            seen.append((step, errors))
            return step == 4

    record = train_and_score(context, Candidate((0, 1)), EndsAtSecond())
    assert [step for step, _ in seen] == [2, 4]
    assert (record.state, record.steps, record.reason) == ("pruned", 4, "dominated at step 4")
    assert [(r.step, r.errors) for r in record.rungs if r.step] == seen
    assert record.rungs[0].step == 0, "before the first step, where no trial ends"


def test_decoding_the_test_split_uses_the_candidates_own_weights(toy: Path, tmp_path: Path) -> None:
    # a test split that is the dev split: the same weights must make the same errors
    again = toy / "dev-again.jsonl"
    again.write_text((toy / "dev.jsonl").read_text())
    context = TrainingContext.open(load_study(write_study(tmp_path / "s", toy, data={"test": str(again)})))
    records = context.config.run_folder / "records"
    for candidate in (Candidate((1,), 4), Candidate((), 0)):
        tested = decode_test(context, train_and_score(context, candidate))
        assert tested.test == tested.dev
        assert read_utterances(records, candidate, "test") == read_utterances(records, candidate, "dev")
        assert read_record(records, candidate) == tested
        assert decode_test(context, tested) is tested


def test_every_utterance_has_its_own_token_limit(toy: Path, tmp_path: Path) -> None:
    decoding = {"tokens_per_second": 5.0, "extra_tokens": 1, "max_tokens": 4}
    context = TrainingContext.open(load_study(write_study(tmp_path, toy, decoding=decoding)))
    assert [token_limit(s, context.config.decoding) for s in (0.2, 0.4, 3.0)] == [2, 3, 4]
    train_and_score(context, Candidate())
    results = read_utterances(context.config.run_folder / "records", Candidate(), "dev") or []
    for utterance, result in zip(context.corpora["dev"], results, strict=True):
        # an untrained model goes on until it is stopped; a token is at least a byte
        assert len(context.system.llm.tokenizer(result.hypothesis).input_ids) <= token_limit(
            utterance.seconds, context.config.decoding
        )


def test_a_decoding_batch_that_does_not_fit_in_memory_is_halved(
    open_context: Callable[..., TrainingContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_context()
    calm = train_and_score(context, Candidate())
    sizes, prefix = [], SpeechLlm.prefix

    def only_three(self: SpeechLlm, states: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            sizes.append(len(states))
            if len(states) > 3:
                raise torch.OutOfMemoryError("out of memory")
        return prefix(self, states, lengths)

    monkeypatch.setattr(SpeechLlm, "prefix", only_three)
    other = open_context("other")
    assert train_and_score(other, Candidate()).dev == calm.dev
    dev = [8, 4, 2, 2, 4, 2, 2]
    held_out = [3] * 5  # at five points between start and end
    assert sizes == [*dev, *dev, *held_out, *dev]  # the anchor, the candidate before its first step, and after its last


def test_dev_counts_are_the_sum_of_the_utterances(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context()
    record = train_and_score(context, Candidate((3,), 2))
    results = read_utterances(context.config.run_folder / "records", Candidate((3,), 2), "dev") or []
    assert record.dev is not None
    assert sum((r.errors for r in results), WordErrors()) == record.dev.errors
    assert [r.id for r in results] == [u.id for u in context.corpora["dev"]]
    assert record.dev.errors.reference_words == sum(len(u.reference.split()) for u in context.corpora["dev"])


def test_a_record_holds_its_provenance(open_context: Callable[..., TrainingContext]) -> None:
    record = train_and_score(open_context(), Candidate())
    assert record.provenance["config"]["training"]["steps"] == 8
    assert record.provenance["versions"].keys() >= {"torch", "transformers", "peft", "optuna"}
    assert RunRecord.model_validate_json(record.model_dump_json()) == record
    assert all(map(math.isfinite, record.losses))


def test_a_fine_tune_learns(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context(training={"init": "scratch", "steps": 60, "learning_rate": 1e-2, "lora_learning_rate": 5e-2})
    losses = train_and_score(context, Candidate((), 8)).losses
    assert losses[-1] < 0.8 * losses[0]


def test_the_anchor_is_trained_once(open_context: Callable[..., TrainingContext]) -> None:
    context = open_context()
    path = train_anchor(context)
    stamp, log = path.stat().st_mtime_ns, json.loads((path.parent / "anchor.json").read_text())
    assert log["steps"] == 12
    assert not same(load_file(path), context.fresh_projector().state_dict())
    assert train_anchor(context).stat().st_mtime_ns == stamp


def test_a_recording_longer_than_the_encoders_window_is_refused_before_training(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, data={"pad_to_seconds": 3.0})  # the toy encoder knows 100 positions: 2 s
    with pytest.raises(StudyError, match=r"train/0.wav: lasts .* s with padding\), longer than the encoder's window of 2 s"):
        _ = TrainingContext.open(load_study(file)).corpora


def test_unknown_lora_targets_are_refused_before_training(toy: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path, toy, llm={"lora_targets": ["q_proj", "kproj"]})
    with pytest.raises(StudyError, match=r"no layer 'kproj'; it has .*k_proj"):
        TrainingContext.open(load_study(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantisation_without_a_gpu_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        TrainingContext.open(load_study(write_study(tmp_path, toy, llm={"quantization": "4bit"})))
    assert caught.value.lines == ["llm.quantization: '4bit' needs a GPU, and there is none; leave the key out"]


def test_models_of_the_wrong_kind_are_refused(toy: Path, tmp_path: Path) -> None:
    swapped = write_study(tmp_path, toy, encoder={"model": str(toy / "llm")}, llm={"model": str(toy / "encoder")})
    with pytest.raises(StudyError) as caught:
        TrainingContext.open(load_study(swapped))
    assert caught.value.lines == [
        "encoder.model: must be a Whisper checkpoint, got one of type 'llama'",
        "llm.model: must be a decoder-only language model, got one of type 'whisper'",
    ]


def test_missing_models_are_one_clear_error(toy: Path, tmp_path: Path) -> None:
    offline = r"the hub cannot be reached, and nobody/{} is not in its cache on this machine\ngive a local folder instead: {}"
    with pytest.raises(StudyError, match=offline.format("no-such-model", "llm.model")):
        TrainingContext.open(load_study(write_study(tmp_path / "a", toy, llm={"model": "nobody/no-such-model"})))
    with pytest.raises(StudyError, match=offline.format("no-such-whisper", "encoder.model")):
        TrainingContext.open(load_study(write_study(tmp_path / "b", toy, encoder={"model": "nobody/no-such-whisper"})))
    with pytest.raises(StudyError, match=r"encoder\.model: .*there is no folder /nowhere/at/all"):
        load_study(write_study(tmp_path / "c", toy, encoder={"model": "/nowhere/at/all"}))
