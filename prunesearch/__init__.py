"""prunesearch: find the encoder layers that can be removed from a speech-LLM.

    study.toml -> StudyConfig -> study -> Candidate -> system -> short fine-tune -> RunRecord -> front -> report

`import prunesearch` offers the public interface; each name is loaded when it is first used, so that the import itself is quick.
The rooms, from the lowest floor up: `study` (what was ordered, what came out); `speech` and `model`; `search`, `training` and
`report`; `workers` and `asr`; `commands`; `cli`. A lower floor never imports a higher one.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The public interface: name -> module
_PUBLIC = {
    # commands: each is what the command line calls
    "abort": "prunesearch.commands.status",
    "clean": "prunesearch.commands.clean",
    "confirm": "prunesearch.commands.confirm",
    "export": "prunesearch.commands.export",
    "join": "prunesearch.commands.worker",
    "launch": "prunesearch.commands.launch",
    "measure": "prunesearch.commands.measure",
    "plan": "prunesearch.commands.plan",
    "retry": "prunesearch.commands.status",
    "scan": "prunesearch.commands.scan",
    "status": "prunesearch.commands.status",
    "write_overlay": "prunesearch.report",
    "write_report": "prunesearch.report",
    # what is ordered, what comes out
    "Candidate": "prunesearch.study.candidate",
    "ProgressListener": "prunesearch.study.progress",
    "RunRecord": "prunesearch.study.record",
    "StudyConfig": "prunesearch.study.config",
    "StudyError": "prunesearch.study.errors",
    "load_study": "prunesearch.study.config",
    "pareto_front": "prunesearch.study.front",
    "read_records": "prunesearch.study.record",
    # search, for any Optuna loop
    "LayerSetSampler": "prunesearch.search.layer_sets",
    "SearchSpace": "prunesearch.search.space",
    # an exported system at work
    "AutoAsr": "prunesearch.asr.auto",
    "SlamAsr": "prunesearch.asr.slam_asr",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # for editors and type checkers
    from prunesearch.asr.auto import AutoAsr as AutoAsr
    from prunesearch.asr.slam_asr import SlamAsr as SlamAsr
    from prunesearch.commands.clean import clean as clean
    from prunesearch.commands.confirm import confirm as confirm
    from prunesearch.commands.export import export as export
    from prunesearch.commands.launch import launch as launch
    from prunesearch.commands.measure import measure as measure
    from prunesearch.commands.plan import plan as plan
    from prunesearch.commands.scan import scan as scan
    from prunesearch.commands.status import abort as abort
    from prunesearch.commands.status import retry as retry
    from prunesearch.commands.status import status as status
    from prunesearch.commands.worker import join as join
    from prunesearch.report import write_overlay as write_overlay
    from prunesearch.report import write_report as write_report
    from prunesearch.search.layer_sets import LayerSetSampler as LayerSetSampler
    from prunesearch.search.space import SearchSpace as SearchSpace
    from prunesearch.study.candidate import Candidate as Candidate
    from prunesearch.study.config import StudyConfig as StudyConfig
    from prunesearch.study.config import load_study as load_study
    from prunesearch.study.errors import StudyError as StudyError
    from prunesearch.study.front import pareto_front as pareto_front
    from prunesearch.study.progress import ProgressListener as ProgressListener
    from prunesearch.study.record import RunRecord as RunRecord
    from prunesearch.study.record import read_records as read_records


def __getattr__(name: str) -> object:
    """Load a public name from its module. Raises AttributeError for any other name."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
