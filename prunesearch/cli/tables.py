"""Tables for the terminal: a plan, a study's progress, a measurement."""

from typing import Any

from rich.console import Group
from rich.table import Table

from prunesearch.commands.plan import Estimate, Plan
from prunesearch.study.measurement import Measurement


def plan_tables(plan: Plan, cost: Estimate) -> Group:
    """Parameters of the baselines and fixed candidates, the size of the study, its estimated cost, and changed preset keys."""
    counts = Table(title=f"{plan.study}: parameters")
    shares = Table(title="parameters saved, relative to unpruned")
    for table in (counts, shares):
        table.add_column("system", no_wrap=True)
    for column in ("encoder", "projector", "LoRA", "LLM", "speech side"):
        counts.add_column(column, justify="right", no_wrap=True)
    for column in ("of the encoder", "of the speech side", "of the whole system"):
        shares.add_column(column, justify="right", no_wrap=True)
    for name, p in plan.named.items():
        counts.add_row(name, *(f"{n:,}" for n in (p.encoder, p.projector, p.lora, p.llm, p.speech)))
        shares.add_row(name, *(f"{100 * share:.2f} %" for share in plan.reduction(name).values()))
    run = Table(title="size of the study", show_header=False)
    for label, value in (
        ("encoder layers", f"{plan.encoder_layers}, {plan.layer_params:,} parameters each"),
        ("candidates in the space", f"{plan.candidates:,}"),
        ("candidates to evaluate", f"{plan.trials} (first the {len(plan.named)} above)"),
        ("steps", f"{plan.anchor_steps} for the anchor, {plan.steps} per candidate, batches of {plan.batch_size}"),
    ):
        run.add_row(label, value)
    needs = Table(title="estimated cost on one GPU", show_header=False)
    at_most = f"at most {cost.repair_seconds:.1f} s per candidate, peak memory {_gib(cost.repair_memory_bytes)}"
    repair = [("repair", at_most)] if cost.repair_seconds else []
    for label, value in (
        ("assumptions", f"recordings of {cost.seconds:g} s, {cost.teraflops:g} x 10^12 operations per second, no decoding"),
        ("peak memory", f"{_gib(cost.memory_bytes)}; {_gib(cost.memory_bytes_longest)} with recordings of data.max_seconds"),
        (
            "training step",
            f"{cost.step_operations / 1e12:.2f} x 10^12 operations in {cost.step_calls:,} calls: {cost.step_seconds:.3f} s",
        ),
        ("encoding", f"{cost.encoding_operations / 1e12:.3f} x 10^12 operations per utterance"),
        *repair,
        ("time", f"{_duration(cost.candidate_hours)} per candidate, {_duration(cost.study_hours)} in total"),
    ):
        needs.add_row(label, value)
    if not plan.overrides:
        return Group(counts, shares, run, needs)
    changed = Table(title="differences from the preset")
    for column in ("key", "preset", "this study"):
        changed.add_column(column)
    for key, (preset, own) in plan.overrides.items():
        changed.add_row(key, str(preset), str(own))
    return Group(counts, shares, run, needs, changed)


def measurement_table(found: Measurement) -> Group:
    """Each system's metrics, each after its ratio to that of the unpruned system."""
    table = Table(title=f"{found.study}: ratio to unpruned, then the value (medians over {found.turns} runs)")
    table.add_column("system")
    for column in (
        "encoder,\nms alone", "encoder,\nms in batches", "samples to text,\nms alone", "real-time factor,\nin batches",
        "tokens\ngenerated", "peak memory,\nMiB", "parameters,\nMiB", "file,\nMiB",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for system in found.systems:
        m, r, low, high = system.figures, system.ratios, system.lowest, system.highest
        table.add_row(
            system.name or system.candidate,
            f"{r.encoder:.3f}  {1e3 * m.encoder_seconds:9.2f}\n{low.encoder:.2f} to {high.encoder:.2f}",
            f"{r.batch_encoder:.3f}  {1e3 * m.batch_encoder_seconds:9.2f}\n{low.batch_encoder:.2f} to {high.batch_encoder:.2f}",
            f"{r.end_to_end:.3f}  {1e3 * m.end_to_end_seconds:9.2f}\n{low.end_to_end:.2f} to {high.end_to_end:.2f}",
            f"{r.batch_end_to_end:.3f}  {m.real_time_factor:8.4f}\n{low.batch_end_to_end:.2f} to {high.batch_end_to_end:.2f}",
            f"{r.new_tokens:.2f}  {m.new_tokens:6.1f}",
            "–" if m.peak_memory_bytes is None else f"{r.peak_memory:.3f}  {_mib(m.peak_memory_bytes)}",
            f"{r.parameters:.3f}  {_mib(m.parameter_bytes)}",
            f"{r.file:.3f}  {_mib(m.file_bytes)}",
        )
    notes = (
        "Milliseconds are per recording. A ratio is taken within a run: the unpruned system is measured again beside each "
        "system. Below it is the range of the ratios over runs; if it is wide, the machine was busy. Samples to text takes "
        "longer if more tokens are generated, so compare it only between systems that generate about as many. File: encoder, "
        "projector and LoRA."
    )
    where = (
        f"{found.device}, {found.dtype}, {found.threads} threads, torch {found.torch}; {found.utterances} recordings of dev, "
        f"{found.audio_seconds:.1f} s, batches of {min(found.batch_size, found.utterances)}"
    )
    return Group(table, notes, where)


def _mib(size: int) -> str:
    return f"{size / 2**20:8.2f}"


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def status_tables(found: dict[str, Any]) -> Group:
    """Trials by state, the remaining work, the workers, and the front so far.

    found: what `commands.status.status` returns.
    """
    states = ", ".join(f"{count} {state}" for state, count in found["states"].items() if count)
    head = Table(title=f"{found['study']}: {found['settled']} of {found['trials']} candidates", show_header=False)
    head.add_row("trials", states or "none yet")
    if found["ended"]:
        head.add_row("without result", ", ".join(f"{count} {why}" for why, count in found["ended"].items()))
    if found["aborted"]:
        head.add_row("aborted", "workers are stopping; `prunesearch launch` resumes the study")
    if found["seconds_each"] is not None:
        left = f"{_duration(found['worker_hours_left'])} for one worker"
        if found["seconds_left"] is not None:
            left += f", {_duration(found['seconds_left'] / 3600)} for the current workers"
        if found["price_left"] is not None:
            left += f", price {found['price_left']:,.2f}"
        head.add_row("remaining", f"{left} ({found['seconds_each']:.0f} s per candidate so far)")
    workers = Table(title="workers")
    for column in ("worker", "candidate", "activity", "last heartbeat"):
        workers.add_column(column)
    for worker in found["running"]:
        activity = f"{worker['doing']} ({worker['done']}/{worker['of']})" if worker["doing"] else ""
        if not worker["alive"]:
            activity = f"lost; last activity: {activity}" if activity else "lost"
        workers.add_row(
            f"{worker['host']}, process {worker['pid']}",
            str(worker["candidate"] or "–"),
            activity,
            f"{worker['heard_seconds_ago']:.0f} s ago",
        )
    front = Table(title="front so far (dev)")
    front.add_column("candidate")
    front.add_column("WER", justify="right")
    front.add_column("parameters", justify="right")
    for row in found["front"]:
        candidate, wer, params = row.values()
        front.add_row(str(candidate), f"{100 * wer:.2f} %", f"{params:,.0f}")
    return Group(head, workers, front) if workers.rows else Group(head, front)
