"""What a plan says a step will take, against steps that are run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.commands.plan import TEXT_TOKENS_PER_SECOND, estimate
from prunesearch.model.families.slam_asr import PROMPT_TOKENS, SlamSystem
from prunesearch.model.system import Target
from prunesearch.study.config import load_study
from prunesearch.training.context import TrainingContext
from tests.conftest import write_study

PAPER = Path(__file__).parents[1] / "studies" / "paper"


def test_counted_operations_equal_those_of_a_real_step(toy: Path, tmp_path: Path) -> None:
    config = load_study(write_study(tmp_path, toy, llm={"prompt": "lowmid"}))
    context = TrainingContext.open(config)
    system = context.system
    assert isinstance(system, SlamSystem)
    assert len(system.llm.prompt) <= PROMPT_TOKENS
    system = replace(system, llm=replace(system.llm, prompt=(1,) * PROMPT_TOKENS))
    text = Target([5] * (round(2 * TEXT_TOKENS_PER_SECOND) + 1))
    with system.reader(system.new_projector(0), 4) as reader, FlopCounterMode(display=False) as counter:
        reader.loss(torch.randn(4, 100, 16), torch.full((4,), 100), [text] * 4).backward()
    assert estimate(config, seconds=2.0).step_operations == counter.get_total_flops()


def test_memory_follows_the_micro_batch_and_hours_the_steps(toy: Path, tmp_path: Path) -> None:
    def estimated(name: str, **training: int | bool) -> tuple[float, ...]:
        settings = {"repair": "none", **training}
        found = estimate(
            load_study(write_study(tmp_path / name, toy, training=settings, data={"max_seconds": 2.0})), seconds=1.0
        )
        return found.memory_bytes, found.memory_bytes_longest, found.step_operations, found.candidate_hours

    usual, longest, operations, hours = estimated("all", batch_size=16)
    in_parts, longest_in_parts, same_operations, _ = estimated("parts", batch_size=16, micro_batch=4)
    assert in_parts < usual < longest
    assert longest_in_parts < longest
    assert operations == same_operations
    assert estimated("again", batch_size=16, gradient_checkpointing=True)[2] > operations  # layers are run twice
    assert estimated("long", batch_size=16, steps=16)[3] == pytest.approx(2 * hours)


def test_the_published_systems_estimate_equals_arithmetic() -> None:
    config = load_study(PAPER / "large-v2-nl.toml", data_must_exist=False)
    found = estimate(config, seconds=5.0, hours=54.0)
    llm_tokens = 8 * (50 + PROMPT_TOKENS + 20)  # 50 audio embeddings in 5 s; the last text token is never read
    matrices = 3_085_938_688 - 151_936 * 2048  # the vocabulary is looked up, not multiplied, but where text is predicted
    assert found.step_operations == pytest.approx(4 * matrices * llm_tokens, rel=0.05)  # forward, and backward to the inputs
    weights = 2 * (3_085_938_688 + 636_784_640)
    assert weights < found.memory_bytes < found.memory_bytes_longest < 40 * 2**30
    assert found.encoding_operations == pytest.approx(2 * 636_784_640 * 250, rel=0.05)
    assert found.study_hours == pytest.approx(config.search.trials * found.candidate_hours)


def test_a_repairs_estimate_equals_arithmetic() -> None:
    config = load_study(PAPER / "large-v2-nl.toml", data_must_exist=False)
    assert estimate(config).repair_seconds == 0, "the published recipe repairs nothing"
    training = config.training.model_copy(update={"repair": "layers", "repair_utterances": 300})
    found = estimate(config.model_copy(update={"training": training}), seconds=5.0, teraflops=100.0)
    rows, width, inner = 300 * 250, 1280, 5120
    sums = 2 * rows * (inner**2 + 2 * inner * width) + 2 * rows * (width**2 + 2 * width**2)
    solves = 5 * (inner**3 / 3 + 4 * inner**2 * width + width**3 / 3 + 4 * width**3)
    widest, out, stacked = 6400, 2048, rows // 5  # the projector's map
    last = 2 * stacked * (widest**2 + 2 * widest * out) + 5 * (widest**3 / 3 + 4 * widest**2 * out)
    passes = 3 * 300 * found.encoding_operations / 100e12
    assert found.repair_seconds == pytest.approx(passes + (32 * (sums + solves) + last) / 25e12, rel=0.1)
    assert found.repair_memory_bytes == 8 * 8 * 6400**2 + 2 * 2 * 636_784_640
