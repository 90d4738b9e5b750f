"""The progress of long work on stderr."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

    from prunesearch.study.record import RunRecord

LOG_SECONDS = 30  # without progress bars, longest time between two lines


class ProgressDisplay:
    """A ProgressListener for people, used as a context manager.

    Prints a line per finished candidate and per note. Shows progress as bars on a terminal; elsewhere, prints a line when
    the activity changes (until the first candidate is finished) and every 30 s.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._candidates = self._bars.add_task("candidates", total=None)
        self._activities: dict[int, TaskID] = {0: self._bars.add_task("loading models", total=None)}  # by worker
        self._finished = 0
        self._started = self._printed = time.monotonic()
        self._activity = ""

    def __enter__(self) -> "ProgressDisplay":
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def progress(self, activity: str, done: int, total: int, /, worker: int = 0) -> None:
        if worker not in self._activities:
            self._activities[worker] = self._bars.add_task(activity, total=total)
        self._bars.update(self._activities[worker], description=activity, completed=done, total=total)
        if self._bars.disable and worker == 0:
            self._log(activity, done, total)

    def finished(self, record: "RunRecord", finished: int, total: int, /) -> None:
        self._bars.update(self._candidates, completed=finished, total=total)
        wer = f"{100 * record.dev.errors.wer:6.2f} %" if record.dev else "   —    "
        params, label = record.parameters.speech / 1e6, record.name or record.candidate.key
        ending = "" if record.state == "complete" else f"  {record.state}: {record.reason}"
        self._finished = finished
        self._print(f"{finished:4d}/{total} dev {record.rate} {wer} {params:8.2f} M  {label}{ending}")

    def note(self, text: str) -> None:
        self._print(text)

    def _log(self, activity: str, done: int, total: int) -> None:
        kind = activity.split(",")[0]  # without the loss, which changes at every step
        changed = kind != self._activity
        self._activity = kind
        if (changed and self._finished == 0) or (not changed and time.monotonic() - self._printed > LOG_SECONDS):
            self._print(f"{activity} ({done}/{total})")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        minutes, seconds = divmod(int(self._printed - self._started), 60)
        # texts may contain [brackets], which are not rich's markup; soft_wrap keeps one line one line in a log
        self._console.print(f"{minutes:3d}:{seconds:02d} {text}", highlight=False, markup=False, soft_wrap=True)
