"""What the scan foretold of real weights, against what was trained: tables/digits.json beside studies/digits/results.

    python benchmarks/search/real.py

The two have anchors of their own (two runs of the same settings), so this asks more of the scan than a search does.
"""

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from prunesearch.scan import spearman

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "studies" / "digits" / "results" / "report.csv"


def main() -> None:
    stored = json.loads((HERE / "tables" / "digits.json").read_text(encoding="utf-8"))
    scores = {
        name: {tuple(map(int, k.split(","))): v for k, v in stored[key].items()}
        for name, key in (("Δ loss of the set", "scan"), ("projector drift of the set", "drift"))
    }
    for name, values in stored["criteria"].items():
        scores[f"{name}, summed"] = {s: sum(values[str(i)] for i in s) for s in scores["Δ loss of the set"]}
    with RESULTS.open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["lora_rank"] == "8" and r["removed_layers"]]
    wer = {tuple(map(int, r["removed_layers"].split())): float(r["dev_wer"]) for r in rows}
    sizes = {size: [s for s in wer if len(s) == size] for size in (1, 2, 3)}
    table = Table(title="Spearman's ρ with trained dev WER, LoRA of rank 8")
    table.add_column("criterion")
    for label in (*(f"{len(some)} sets of {size}" for size, some in sizes.items()), f"all {len(wer)}"):
        table.add_column(label, justify="right")
    for name, values in scores.items():
        cells = (spearman([values[s] for s in some], [wer[s] for s in some]) for some in (*sizes.values(), list(wer)))
        table.add_row(name, *(f"{rho:+.2f}" for rho in cells))
    Console(width=110).print(table)
    loss = scores["Δ loss of the set"]
    for size in (1, 2, 3):
        best = sorted((s for s in loss if len(s) == size), key=loss.__getitem__)[:3]
        print(f"least Δ loss of {size}: " + ", ".join(f"{' '.join(map(str, s))} ({loss[s]:.2f})" for s in best))


if __name__ == "__main__":
    main()
