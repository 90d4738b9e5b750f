"""Count what a study will run, before it runs: parameters by group, the size of the space, steps, hours and memory.

Neither weights nor data are read."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunesearch.model.families import encoder_layers, family_of
from prunesearch.model.skeleton import params_of_candidates, skeleton
from prunesearch.search.space import SearchSpace
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import StudyConfig, load_study
from prunesearch.study.record import Parameters

if TYPE_CHECKING:
    from prunesearch.model.system import SpeechSystem
    from prunesearch.training.repair_cost import RepairCost

TEXT_TOKENS_PER_SECOND = 4.0  # read speech has 2 to 3 words a second; LLMs' tokenizers make 1.3 (English) to 2 tokens of one
PRECISE = 0.25  # speed of fp32 and float64 products, as a fraction of the speed in bf16
CALL_SECONDS = 10e-6  # what starting an operation takes the host in eager PyTorch; small batches wait for this


@dataclass(frozen=True)
class Plan:
    """Parameters of the named candidates, the size of the search space, and the training budget."""

    study: str
    encoder_layers: int
    layer_params: int
    named: dict[str, Parameters]
    candidates: int
    trials: int
    steps: int
    anchor_steps: int
    batch_size: int
    overrides: dict[str, tuple[Any, Any]]  # keys that differ from the preset: (preset's value, study's)

    def reduction(self, name: str) -> dict[str, float]:
        """What a named system saves against `unpruned`, as fractions of encoder, speech side and whole system."""
        here, full = self.named[name], self.named["unpruned"]
        return {
            "encoder": 1 - here.encoder / full.encoder,
            "speech": 1 - here.speech / full.speech,
            "total": 1 - here.total / full.total,
        }

    def to_json(self) -> dict[str, Any]:
        named = {
            name: {**p.model_dump(), "speech": p.speech, "total": p.total, "reduction": self.reduction(name)}
            for name, p in self.named.items()
        }
        return {**{k: v for k, v in vars(self).items() if k != "named"}, "named": named}


def plan(study: StudyConfig | str | Path) -> Plan:
    """Count parameters, candidates and steps of a study, given as its file, its folder or its configuration.

    Raises StudyError when the study file or a model's configuration cannot be read.
    """
    config = study if isinstance(study, StudyConfig) else load_study(study, data_must_exist=False)
    count = params_of_candidates(config)
    depth = encoder_layers(config)
    space = SearchSpace.of(config, depth)
    return Plan(
        study=config.name,
        encoder_layers=depth,
        layer_params=count(Candidate()).encoder - count(Candidate((depth - 1,))).encoder,
        named={name: count(candidate) for name, candidate in space.named.items()},
        candidates=space.size,
        trials=config.search.trials,
        steps=config.training.steps,
        anchor_steps=_anchor_steps(config),
        batch_size=config.training.batch_size,
        overrides=config.overrides(),
    )


def _anchor_steps(config: StudyConfig) -> int:
    """Steps that the anchor is trained; 0 where none is trained."""
    trains = config.training.init == "anchor" and config.anchor.weights is None and not family_of(config).is_trained
    return config.anchor.steps if trains else 0


@dataclass(frozen=True)
class Estimate:
    """What a study will cost on a GPU that achieves `teraflops` x 10^12 operations a second, without decoding.

    A step takes as long as its operations, or as long as the host needs to start them where that is more.
    `memory_bytes` is the peak of a step on recordings of `seconds`, and `memory_bytes_longest` on recordings of the study's
    `max_seconds`: with the largest LoRA rank, encoder included, no micro-batch halved, and without quantisation.
    """

    seconds: float
    teraflops: float
    step_operations: int
    step_calls: int
    step_seconds: float
    encoding_operations: int  # one utterance, all layers
    memory_bytes: int
    memory_bytes_longest: int
    repair_seconds: float  # a candidate's repair, at most; 0 where nothing is repaired
    repair_memory_bytes: int
    candidate_hours: float
    study_hours: float


def estimate(config: StudyConfig, seconds: float = 5.0, hours: float | None = None, teraflops: float = 100.0) -> Estimate:
    """Estimate time and memory from one training step on tensors without data.

    `seconds`: mean length of a recording. `hours`: size of the train split; None: no recording is used twice. `teraflops`:
    speed that the GPU reaches, in 10^12 operations per second.

    Raises StudyError when a model's configuration cannot be read.
    """
    import torch

    from prunesearch.training.step_cost import StepCost, encoding_operations, step_cost

    training, rank = config.training, max(config.search.lora_ranks[-1], config.search.baseline_lora_rank)
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16

    @cache
    def step(length: float, batch: int) -> StepCost:
        """The cost of a step on `batch` recordings of `length` seconds."""
        system = skeleton(config, dtype)
        if training.gradient_checkpointing:
            system.recompute_activations()
        text = round(length * TEXT_TOKENS_PER_SECOND) + 1
        with system.reader(system.new_projector(0), rank) as reader:
            return step_cost(reader, system.encoder.width, system.encoder.positions(length), text, batch, dtype)

    system = skeleton(config, dtype)
    encoder, positions = system.encoder, system.encoder.positions(seconds)
    encoding = encoding_operations(encoder, positions)
    encoder_bytes = sum(p.nbytes for p in encoder.module.parameters())
    micro_batch = min(training.micro_batch or training.batch_size, training.batch_size)
    whole = step(seconds, training.batch_size)
    usual, longest = step(seconds, micro_batch), step(config.data.max_seconds, micro_batch)

    parts = -(-training.batch_size // micro_batch)
    step_seconds = max(whole.operations / (teraflops * 1e12), parts * usual.calls * CALL_SECONDS)

    repair = _repair_cost(config, system, positions, encoding)
    repair_seconds = (repair.operations + repair.precise_operations / PRECISE) / (teraflops * 1e12)

    def fine_tune(steps: int) -> float:
        drawn = steps * training.batch_size
        encoded = drawn if hours is None else min(drawn, 3600 * hours / seconds)
        return (steps * step_seconds + encoded * encoding / (teraflops * 1e12)) / 3600

    anchor = fine_tune(steps) if (steps := _anchor_steps(config)) else 0.0
    return Estimate(
        seconds=seconds,
        teraflops=teraflops,
        step_operations=whole.operations,
        step_calls=parts * usual.calls,
        step_seconds=step_seconds,
        encoding_operations=encoding,
        memory_bytes=usual.peak_bytes + encoder_bytes,
        memory_bytes_longest=longest.peak_bytes + encoder_bytes,
        repair_seconds=repair_seconds,
        repair_memory_bytes=repair.memory_bytes + 2 * encoder_bytes if repair.memory_bytes else 0,
        candidate_hours=repair_seconds / 3600 + fine_tune(training.steps),
        study_hours=anchor + config.search.trials * (repair_seconds / 3600 + fine_tune(training.steps)),
    )


def _repair_cost(config: StudyConfig, system: "SpeechSystem", positions: int, encoding: int) -> "RepairCost":
    """Of one candidate, at most. `positions` and `encoding`: of one recording."""
    from prunesearch.training.repair_cost import RepairCost, repair_cost

    training, encoder, entry = config.training, system.encoder, system.new_projector(0).entry
    if training.repair == "none":
        return RepairCost(0, 0, 0)
    utterances, depth = training.repair_utterances, encoder.depth
    first = config.shared_layers(depth) if training.repair == "layers" else depth
    maps = entry.in_features // encoder.width, entry.in_features, entry.out_features
    return repair_cost(encoder, first, maps, utterances * positions, utterances * encoding)
