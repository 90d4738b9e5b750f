"""A comparison as plain data for other programs: JSON and CSV. Their keys are stable."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from prunesearch.report.comparison import Comparison, Contrast
from prunesearch.report.error_analysis import KINDS, ErrorAnalysis, ErrorChange
from prunesearch.report.paper_claims import PaperClaim
from prunesearch.report.verdict import verdict
from prunesearch.study.front import dev_wer
from prunesearch.study.record import RunRecord, WordErrors


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data. WERs and reductions are fractions; null means unknown or not decoded."""

    def record(r: RunRecord) -> dict[str, Any]:
        return record_data(comparison, r)

    return {
        "study": comparison.study,
        "objective": comparison.objective,
        "candidates": {
            "complete": len(comparison.complete),
            "pruned": len(comparison.pruned),
            "failed": len(comparison.failed),
        },
        "verdict": list(verdict(comparison)),
        "baselines": {name: record(r) for name, r in comparison.baselines.items()},
        "front": [record(r) for r in comparison.front],
        "dominating": [{**record(c.system), "difference_to_top2_lora": difference_data(c)} for c in comparison.dominating],
        "best_by_removed": {str(n): {**record(b.record), "tried": b.tried} for n, b in comparison.best_by_removed.items()},
        "claims": [_paper_claim_data(c) for c in comparison.paper_claims],
        "lora_changes": [_change_data(c) for c in comparison.lora_changes],
        "layer_changes": [_change_data(c) for c in comparison.pruning_changes],
        "anatomy": comparison.error_analysis and _analysis_data(comparison.error_analysis),
        "measured": comparison.measured and asdict(comparison.measured),
        "knee": comparison.knee and comparison.knee.candidate.key,
        "hypervolume": {"reference": comparison.reference, **comparison.hypervolumes},
        "differences": {f"{c.system.name} - {c.reference.name}": difference_data(c) for c in comparison.differences},
    }


def _paper_claim_data(claim: PaperClaim) -> dict[str, Any]:
    """The verdict keeps its older key, `word`."""
    return {("word" if key == "verdict" else key): value for key, value in asdict(claim).items()}


def _change_data(change: ErrorChange) -> dict[str, Any]:
    names = {"system": change.system.candidate.key, "against": change.reference.candidate.key}
    return {**names, "split": change.split, "language": change.language, **{kind: change.of(kind) for kind in KINDS}}


def _analysis_data(found: ErrorAnalysis) -> dict[str, Any]:
    return {
        "system": found.system.candidate.key,
        "against": found.reference.candidate.key,
        "split": found.split,
        "confusions": [asdict(c) for c in found.confusions],
        "worse": [asdict(c) for c in found.worse],
        "better": [asdict(c) for c in found.better],
    }


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """One line per complete record of the studies. Layers are separated by spaces; WERs by language or group are JSON."""
    rows = [{"study": c.study, **record_data(c, r)} for c in comparisons for r in c.complete]
    for row in rows:
        row["removed_layers"] = " ".join(map(str, row["removed_layers"]))
        for key in (key for key in row if "_wer_by_" in key):
            row[key] = json.dumps(row[key])
    text = io.StringIO()
    writer = csv.DictWriter(text, ("study", *RECORD_KEYS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


RECORD_KEYS = (
    *("name", "key", "removed_layers", "lora_rank", "dev_wer", "test_wer"),
    *("encoder_params", "projector_params", "lora_params", "llm_params", "speech_params", "total_params"),
    *("metric", "errors_split", "substitutions", "deletions", "insertions", "reference_words", "dev_cer", "test_cer"),
    *("dev_wer_by_language", "test_wer_by_language", "dev_wer_by_group", "test_wer_by_group"),
    *("dev_worst_group_wer", "test_worst_group_wer", "loop_rate", "empty_rate", "token_limit_rate", "switched_rate"),
    *("encoder_reduction", "speech_reduction", "total_reduction", "train_seconds", "trainings", "state"),
)


def record_data(comparison: Comparison, record: RunRecord) -> dict[str, Any]:
    """A complete record under the keys of RECORD_KEYS."""
    results = {"dev": record.dev, "test": record.test}
    split, decoded = record.reported or (None, None)
    reductions = comparison.reductions(record)
    parameters = record.parameters
    groups = ("encoder", "projector", "lora", "llm", "speech", "total")
    data: dict[str, Any] = {
        "name": record.name,
        "key": record.candidate.key,
        "removed_layers": list(record.removed_layers),
        "lora_rank": record.lora_rank,
        "dev_wer": dev_wer(record),
        "test_wer": record.test.errors.wer if record.test else None,
        **{f"{group}_params": getattr(parameters, group) for group in groups},
        "metric": decoded and decoded.metric,
        "errors_split": split,
        **(decoded.errors.model_dump() if decoded else {}),
        **{f"{name}_cer": result and result.characters and result.characters.cer for name, result in results.items()},
        **{f"{name}_wer_by_language": result and _wers(result.by_language) for name, result in results.items()},
        **{f"{name}_wer_by_group": result and _wers(result.by_group) for name, result in results.items()},
        **{f"{name}_worst_group_wer": result and result.worst_group_wer for name, result in results.items()},
        "loop_rate": decoded and decoded.loop_rate,
        "empty_rate": decoded and decoded.empty_rate,
        "token_limit_rate": decoded and decoded.token_limit_rate,
        "switched_rate": decoded and decoded.switched_rate,
        **{f"{g}_reduction": getattr(reductions, g) if reductions else None for g in ("encoder", "speech", "total")},
        "train_seconds": record.cost.train_seconds,
        "trainings": comparison.trainings.get(record.candidate, 0),
        "state": record.state,
    }
    return {key: data[key] for key in RECORD_KEYS}


def difference_data(contrast: Contrast) -> dict[str, Any] | None:
    found = contrast.difference
    if found is None:
        return None
    return {
        "split": contrast.split,
        "estimate": found.estimate,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
    }


def _wers(errors: dict[str, WordErrors]) -> dict[str, float]:
    return {name: counts.wer for name, counts in errors.items()}
