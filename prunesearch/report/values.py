"""Format single values for a report: names, layers, error rates, parameters and differences as text."""

import math
import re

from prunesearch.report.comparison import Comparison
from prunesearch.study.record import RunRecord, SplitResult, WordErrors

UNKNOWN = "–"

# Of each objective: the noun for running text, and the axis label, which also says what is counted.
OBJECTIVE_NOUNS = {
    "speech_params": "speech parameters",
    "encoder_params": "encoder parameters",
    "total_params": "total parameters",
}
OBJECTIVE_LABELS = {
    "speech_params": "Speech parameters (encoder + projector + LoRA), millions",
    "encoder_params": "Encoder parameters, millions",
    "total_params": "Total parameters (speech and LLM), millions",
}
PARAMETER_GROUPS = ("encoder", "speech", "total")

CRITERION_LABELS = {
    "repaired_loss": "Δ loss after repair",
    "residual": "residual",
    "delta_loss": "Δ loss, nats per token",
    "drift": "projector drift",
    "delta_wer": "Δ WER",
    "block_influence": "Block Influence",
    "frobenius_change": "relative change",
    "cka_distance": "1 − CKA",
    "angular_distance": "angular distance, π",
}


def title(record: RunRecord) -> str:
    """A baseline's name, else the candidate's key."""
    return record.name or record.candidate.key


def layers(record: RunRecord) -> str:
    return " ".join(map(str, record.removed_layers)) or UNKNOWN


def rank(record: RunRecord) -> str:
    return str(record.lora_rank or UNKNOWN)


def wer_percent(split: SplitResult | None) -> str:
    return percent(split.errors) if split else UNKNOWN


def language_percent(split: SplitResult | None, language: str) -> str:
    return percent(split.by_language[language]) if split and language in split.by_language else UNKNOWN


def percent(errors: WordErrors) -> str:
    """A WER in percent; unknown over no words."""
    return f"{100 * errors.wer:.2f}" if errors.reference_words else UNKNOWN


def kinds_per_100_words(errors: WordErrors) -> tuple[float, float, float]:
    """Substitutions, deletions and insertions (S/D/I) per 100 reference words."""
    words = errors.reference_words or math.nan
    substitutions, deletions, insertions = (
        100 * count / words for count in (errors.substitutions, errors.deletions, errors.insertions)
    )
    return substitutions, deletions, insertions


def kinds_text(errors: WordErrors) -> str:
    return "/".join(f"{rate:.1f}" for rate in kinds_per_100_words(errors)) if errors.reference_words else UNKNOWN


def parameters_and_changes(comparison: Comparison, record: RunRecord) -> list[tuple[str, str]]:
    """For encoder, speech and total: millions of parameters, and the change against the unpruned system."""
    return [parameters_and_change(comparison, record, group) for group in PARAMETER_GROUPS]


def parameters_and_change(comparison: Comparison, record: RunRecord, group: str) -> tuple[str, str]:
    saved = comparison.reductions(record)
    return millions(getattr(record.parameters, group)), f"{signed(-100 * getattr(saved, group))} %" if saved else UNKNOWN


def named(text: str, rate: str) -> str:
    """A text about WER as one about the study's own error rate (`Comparison.rate`)."""
    return re.sub(r"\bWERs?\b", rate, text) if rate != "WER" else text


def points(wer: float) -> str:
    """A difference of WERs in percentage points."""
    return signed(100 * wer)


def signed(value: float) -> str:
    """Two decimals, a true minus sign, and no sign on zero."""
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def signed_count(count: int) -> str:
    return f"{count:+d}".replace("-", "−")


def millions(params: int) -> str:
    return f"{params / 1e6:,.2f}" if params >= 1e6 else f"{params / 1e6:.3g}"
