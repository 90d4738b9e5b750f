"""A pytest plugin for the full check: a test may be skipped for want of a GPU, and for no other reason.

Load it with `python -m pytest -p tests.no_skips`. Without it, a missing program (PostgreSQL, Chromium) only skips its tests.
"""

import re
from collections.abc import Generator

import pytest

ALLOWED = re.compile(r"\b(GPU|CUDA)\b", re.IGNORECASE)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):  # an expected failure is reported as a skip, too
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not ALLOWED.search(reason):
        report.outcome = "failed"
        report.longrepr = f"no test may be skipped here, except for want of a GPU: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
