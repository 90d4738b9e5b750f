"""The shipped studies of the published experiment: what can be known of them without network, data or GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prunesearch.commands.plan import plan
from prunesearch.model.skeleton import params_of_candidates
from prunesearch.study.candidate import Candidate
from prunesearch.study.config import load_study

STUDIES = Path(__file__).parents[1] / "studies" / "paper"


@pytest.mark.parametrize(
    ("encoder", "of_encoder", "of_speech", "of_all"),
    [("small", 16.1, 14.1, 0.44), ("medium", 8.2, 7.8, 0.74), ("large-v2", 6.2, 6.0, 1.05)],
)
def test_the_shares_of_two_layers_are_the_published_ones(
    encoder: str, of_encoder: float, of_speech: float, of_all: float
) -> None:
    made = plan(load_study(STUDIES / f"{encoder}-da.toml", data_must_exist=False))
    shares = {name: 100 * share for name, share in made.reduction("top2").items()}
    assert round(shares["encoder"], 1) == of_encoder
    assert round(shares["speech"], 1) == of_speech
    assert round(shares["total"], 2) == of_all


def test_lora_counts_two_matrices_per_attention_layer_of_qwen() -> None:
    count = params_of_candidates(load_study(STUDIES / "large-v2-nl.toml", data_must_exist=False))
    hidden, key_value, layers = 2048, 256, 36  # Qwen2.5-3B: two of sixteen heads for keys and values
    shapes = ((hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, hidden))  # q, k, v, o
    for rank in (8, 16):
        assert count(Candidate((), rank)).lora == layers * sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def whisper_encoder_parameters(width: int, layers: int, mels: int = 80, positions: int = 1500) -> int:
    """By the architecture: two convolutions, positions, layers, final LayerNorm. Key projections have no bias."""
    convolutions = (3 * mels * width + width) + (3 * width * width + width)
    attention = 4 * width * width + 3 * width
    feed_forward = 2 * 4 * width * width + 4 * width + width
    norm = 2 * width
    return convolutions + positions * width + layers * (attention + feed_forward + 2 * norm) + norm


def test_every_paper_study_has_the_published_depths_with_and_without_lora() -> None:
    files = sorted(STUDIES.glob("*.toml"))
    assert len(files) == 9
    for file in files:
        config = load_study(file, data_must_exist=False)
        named = plan(config).named if file.stem == "small-da" else None
        depths = {(len(c.removed_layers), c.lora_rank > 0) for c in config.fixed_candidates()}
        assert depths == {(k, lora) for k in (4, 6, 8) for lora in (False, True)}
        assert config.search.baseline_lora_rank == (8 if file.stem.endswith("da") else 16)
        assert (config.training.init, config.training.learning_rate, config.seed) == ("scratch", 1e-4, 42)
        assert named is None or len(named) == 10


def test_paper_studies_are_planned_without_network_data_or_variables() -> None:
    command = [sys.executable, "cli.py", "plan", str(STUDIES / "large-v2-da.toml"), "--json"]
    done = subprocess.run(command, cwd=STUDIES.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["named"]["unpruned"]["encoder"] == whisper_encoder_parameters(width=1280, layers=32)


def test_a_plan_lists_the_changed_preset_keys(tmp_path: Path) -> None:
    text = (STUDIES / "large-v2-da.toml").read_text()
    file = tmp_path / "study.toml"
    file.write_text(text + "\n[projector]\nhidden = 1024\n\n[decoding]\ntest_beams = 2\n")
    assert plan(load_study(file, data_must_exist=False)).overrides == {"projector.hidden": (2048, 1024)}
