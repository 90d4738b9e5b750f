"""Compare studies and write their report; one that cannot be written is still shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunesearch.report import Comparison, comparison_of, report_folder, write_comparison, write_overlay
from prunesearch.study.config import load_study
from prunesearch.study.files import NotWritable
from prunesearch.workers.final_test import fetch_records


@dataclass(frozen=True)
class Reported:
    """Comparisons of one or several studies.

    page: the report without its file's ending; None if it was not written.
    not_written: why it was not written, and the fix; None if it was.
    """

    comparisons: list[Comparison]
    page: Path | None
    not_written: str | None = None


def report(studies: Sequence[str | Path], out: Path | None = None, storage: str | None = None) -> Reported:
    """Compare the studies, and write the report of one or the overlay of several to a folder.

    out: the folder; by default the run folder's `report`, for several studies `overlay` in the working directory. A default
        folder that cannot be written to is no error, so that a study on a read-only disk can be looked at.

    Raises StudyError for errors in the user's input.
    """
    configs = [load_study(study, data_must_exist=False) for study in studies]
    for config in configs:
        fetch_records(config, storage)
    if len(configs) > 1:
        folder = out or Path("overlay")
        return Reported(write_overlay(configs, folder), folder / "overlay")
    comparison, folder = comparison_of(configs[0]), out or report_folder(configs[0])
    try:
        write_comparison(comparison, folder)
    except NotWritable as error:
        if out is not None:
            raise
        fix = "--out FOLDER writes it elsewhere"
        return Reported([comparison], None, f"the report was not written: {error.reason}: {folder}; {fix}")
    return Reported([comparison], folder / "report")
