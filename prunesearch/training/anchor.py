"""The anchor: the unpruned encoder's projector, trained once per study without LoRA. Every candidate starts from it."""

import hashlib
import json
from pathlib import Path

from torch import Tensor

from prunesearch.model.system import Reader, SpeechProjector
from prunesearch.study.candidate import Candidate
from prunesearch.study.errors import StudyError
from prunesearch.study.files import write_atomically
from prunesearch.study.record import SplitResult
from prunesearch.training.context import TrainingContext
from prunesearch.training.finetune import (
    CurvePoint,
    Diverged,
    FineTune,
    FineTuneProgress,
    FineTuneSettings,
    TrainingSet,
)
from prunesearch.training.tensors import is_whole, read_tensors, write_tensors


def anchor_weights(context: TrainingContext) -> Path:
    """Where the anchor's weights are, once it is trained."""
    return context.config.run_folder / "anchor" / "projector.safetensors"


def read_anchor(weights: Path, projector: SpeechProjector) -> dict[str, Tensor]:
    """The anchor's weights from their file, for a projector. Raises StudyError for a file that is damaged or another one."""
    return read_tensors(weights, projector.state_dict(), _fix(weights))


def _fix(weights: Path) -> str:
    return (
        f"restore it from a copy; or delete {weights.parent}: the anchor is trained again, and if it differs from the former "
        "one, the study continues with --allow-changes only"
    )


def train_anchor(context: TrainingContext) -> Path:
    """The anchor's weights, trained (or copied from `anchor.weights`) by the first worker that needs them; the others wait.

    All processes of a group call this. Raises StudyError when the training diverges: without an anchor there is no study.
    """
    weights, group = anchor_weights(context), context.group
    weights.parent.mkdir(parents=True, exist_ok=True)
    with group.lock(weights.parent / "lock"):
        if not group.broadcast(weights.exists()):
            with context.system.reader(context.fresh_projector()) as reader:
                given = context.system.trained_projector
                if given is None:
                    progress = _train(context, reader, weights.parent / "checkpoint.pt")
                else:
                    reader.projector.load_state_dict(given)
                    progress = FineTuneProgress(micro_batch=0)
                    reader.projector.eval()
                if group.is_main_process:
                    _write(context, reader, progress, weights)
            group.broadcast(None)  # the other processes read what the main process has written
    if not is_whole(weights):  # told before its digest is compared with the one that the study is locked to
        raise StudyError([f"{weights}: the file is cut off or damaged: {_fix(weights)}"])
    return weights


def _train(context: TrainingContext, reader: Reader, checkpoint: Path) -> FineTuneProgress:
    config, budget = context.config, context.anchor_budget
    train = context.encoded(context.pruned_encoder(Candidate()), "train", context.drawn(budget))

    def on_point(point: CurvePoint) -> None:
        context.main_progress(f"anchor, loss {point.loss:.2f}", point.step, budget.steps)

    settings = FineTuneSettings(config.training, context.group, context.dtype, checkpoint, on_point)
    fine_tune = FineTune(reader, TrainingSet(train, context.targets), budget, settings)
    try:
        with fine_tune.checkpoint_when_interrupted():
            fine_tune.run_to(budget.steps)
    except Diverged as error:
        rate = config.anchor.learning_rate
        raise StudyError([f"anchor.learning_rate: with {rate:g}, {error}; try a smaller one"]) from error
    return fine_tune.progress


def _write(context: TrainingContext, reader: Reader, progress: FineTuneProgress, weights: Path) -> None:
    dev = context.encoded(context.pruned_encoder(Candidate()), "dev", context.used("dev"))
    result = SplitResult.of(context.decode(reader, "dev", dev))
    log = {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 1),
        "losses": progress.losses,
        "dev_wer": result.errors.wer,
        "dev": result.model_dump(),
    }
    write_atomically(weights.with_name("anchor.json"), json.dumps(log, indent=1) + "\n")
    write_tensors(weights, reader.projector.state_dict())
    weights.with_name("checkpoint.pt").unlink(missing_ok=True)


def anchor_digest(context: TrainingContext) -> str:
    """The digest of what candidates start from: the anchor's file, or the models themselves where they are trained already."""
    if context.system.is_trained:
        return hashlib.sha256(json.dumps(context.model_digests, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(_weights(context).read_bytes()).hexdigest()


def starting_projector(context: TrainingContext, repeat: int = 0) -> SpeechProjector:
    """The projector that candidates start with: the anchor's, or a fresh one where the study's `training.init` is `scratch`."""
    return anchor_projector(context, repeat) if context.config.training.init == "anchor" else context.fresh_projector(repeat)


def anchor_projector(context: TrainingContext, repeat: int = 0) -> SpeechProjector:
    """The anchor's projector. A system that is trained already is its own anchor."""
    projector = context.fresh_projector(repeat)
    if not context.system.is_trained:
        projector.load_state_dict(read_anchor(_weights(context), projector))
    return projector


def _weights(context: TrainingContext) -> Path:
    """The anchor's weights, trained only if they are not there: of a group of processes, a single one can read them."""
    weights = anchor_weights(context)
    return weights if weights.exists() else train_anchor(context)
