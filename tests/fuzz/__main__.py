"""Run all fuzz targets, each for the same time: `python -m tests.fuzz --seconds 600`. Exit code 1 where something was wrong."""

import argparse
import sys

from tests.fuzz import audio, models, studies, tables

BORDERS = {"audio": audio.fuzz, "models": models.fuzz, "studies": studies.fuzz, "tables": tables.fuzz}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = 0
    for border, fuzz in BORDERS.items():
        found = fuzz(arguments.seed, arguments.seconds / len(BORDERS), None)
        print(f"{border}: {found.tried} tried, {found.read} read, {found.named} named, {len(found.wrong)} wrong", flush=True)
        for line in found.wrong:
            print(f"  {line}", flush=True)
        faults += len(found.wrong)
    return min(1, faults)


if __name__ == "__main__":
    sys.exit(main())
