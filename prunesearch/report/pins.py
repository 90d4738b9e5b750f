"""Pins: a reader of the page can pin two candidates to compare them. The panel, all numbers as JSON, and the script."""

import json
from collections.abc import Callable, Iterable
from importlib.resources import files

from prunesearch.report.values import kinds_per_100_words, named, title
from prunesearch.study.front import latest_dev_errors
from prunesearch.study.record import RunRecord, SplitResult, WordErrors

PANEL = (
    '<section id="pins" aria-live="polite" aria-label="Pinned candidates" tabindex="-1">'
    "<p>Nothing is pinned. Click a point, or a pin button in the first table, to compare two candidates.</p>"
    '<div class="scroll" tabindex="0" role="region" aria-label="Pinned candidates, table" hidden>'
    "<table><caption>Pinned candidates<small>S/D/I: substitutions, deletions and insertions per 100 reference words. "
    "M: millions of parameters.</small></caption><thead></thead><tbody></tbody></table></div>"
    '<button type="button" hidden>clear</button></section>'
)

Values = tuple[float, ...] | None  # None: not measured
Rows = dict[str, tuple[int, Callable[[RunRecord], Values]]]

# The rows of the comparison: number of decimals, and a record's values.
ROWS: Rows = {
    "layers removed": (0, lambda r: (len(r.removed_layers),)),
    "LoRA rank": (0, lambda r: (r.lora_rank,)),
    "dev WER, %": (2, lambda r: _wer(latest_dev_errors(r))),
    "test WER, %": (2, lambda r: _wer(_test(r))),
    "dev S/D/I": (1, lambda r: _kinds(latest_dev_errors(r))),
    "test S/D/I": (1, lambda r: _kinds(_test(r))),
    "worst group, dev %": (2, lambda r: _worst(r.dev)),
    "worst group, test %": (2, lambda r: _worst(r.test)),
    "encoder, M": (3, lambda r: (r.parameters.encoder / 1e6,)),
    "speech, M": (3, lambda r: (r.parameters.speech / 1e6,)),
    "total, M": (3, lambda r: (r.parameters.total / 1e6,)),
}


def pin_script(records: Iterable[RunRecord], rate: str = "WER") -> str:
    """The records' numbers, and the script that shows them; both come after plot, panel and tables on the page.

    Rows for which no record has a value are left out.
    """
    records = list(records)
    rows = {label: row for label, row in ROWS.items() if any(row[1](r) is not None for r in records)}
    data = {
        "rows": [(named(label, rate), decimals) for label, (decimals, _) in rows.items()],
        "candidates": {r.candidate.key: _candidate(r, rows) for r in records},
    }
    # without any "<", so that neither </script> nor <!-- in a name can end or change the element
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    script = files("prunesearch.report").joinpath("pin.js").read_text(encoding="utf-8")
    return f'<script type="application/json" id="candidates">{embedded}</script>\n<script>\n{script}</script>'


def full_title(record: RunRecord) -> str:
    return title(record) + (" (ended at a rung)" if record.state == "pruned" else "")


def strip(record: RunRecord) -> str:
    """The encoder's layers, first to last: ■ kept, □ removed."""
    return "".join("□" if i in record.removed_layers else "■" for i in range(record.encoder_layers))


def _candidate(record: RunRecord, rows: Rows) -> dict[str, object]:
    removed = ", ".join(map(str, record.removed_layers)) or "none"
    return {
        "title": full_title(record),
        "strip": strip(record),
        "removed": f"removed of {record.encoder_layers}: {removed}",
        "values": [of(record) for _, of in rows.values()],
    }


def _test(record: RunRecord) -> WordErrors | None:
    return record.test.errors if record.test else None


def _wer(errors: WordErrors | None) -> Values:
    return None if errors is None else (100 * errors.wer,)


def _worst(split: SplitResult | None) -> Values:
    return None if split is None or split.worst_group_wer is None else (100 * split.worst_group_wer,)


def _kinds(errors: WordErrors | None) -> Values:
    return None if errors is None else kinds_per_100_words(errors)
