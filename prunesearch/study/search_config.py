"""The `[search]` section of a study file: which candidates there are, and how they are proposed."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from prunesearch.study.candidate import Candidate, count_candidates
from prunesearch.study.section import Count, Positive, Section, context_of

Objective = Literal["speech_params", "encoder_params", "total_params"]
Sampler = Literal["layer-sets", "tpe", "nsga2", "gp", "random", "grid"]

MOST_LISTED = 200_000  # candidates that `sampler = "grid"` can list: memory and time grow with their number


class FixedCandidate(Section):
    """A candidate that the study always evaluates, after the baselines."""

    removed_layers: tuple[int, ...] = ()
    lora_rank: Annotated[int, Field(ge=0)] = 0
    repeat: Annotated[int, Field(ge=0)] = 0

    @field_validator("removed_layers")
    @classmethod
    def _check_layers(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        depth = context_of(info, "encoder_layers")
        if len(_check_indices(value, info)) == depth:
            raise ValueError(f"must leave one of the encoder's {depth} layers, got {list(value)}: name fewer layers")
        return value


class SearchConfig(Section):
    """The search space, the sampler that proposes candidates, and the number of candidates (baselines included)."""

    removable_layers: tuple[int, ...] | Literal["all"] = "all"
    max_removed: Count | None = Field(None, description="default: half of the removable layers")
    lora_ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0, 4, 8, 16)
    baseline_lora_rank: Annotated[int, Field(ge=1)] = 8
    params_objective: Objective = "speech_params"
    sampler: Sampler = "layer-sets"
    startup_trials: Count = Field(6, description="sets of every size to evaluate before the sampler fits its first model")
    scan: bool = Field(True, description="measure the importance of layers first, and propose from it")
    repeats: Annotated[int, Field(ge=0)] = Field(
        0,
        description="most further trainings per system, from other seeds, that layer-sets may use to tell the front from noise",
    )
    max_worst_group_wer: Positive | None = Field(
        None,
        description="a fraction; candidates whose worst group's (of data.group) dev WER exceeds it are excluded from the front",
    )
    trials: Count = 40
    fixed: tuple[FixedCandidate, ...] = ()

    @field_validator("removable_layers")
    @classmethod
    def _check_layers(cls, value: Any, info: ValidationInfo) -> Any:
        if not value:
            raise ValueError('must name at least one layer, got []: list zero-based indices, or write "all"')
        return value if value == "all" else _check_indices(value, info)

    @field_validator("lora_ranks")
    @classmethod
    def _check_ranks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or list(value) != sorted(set(value)):
            example = sorted(set(value)) or [0, 8]
            raise ValueError(
                f"lora_ranks must rise and have at least one rank (0: no LoRA), got {list(value)}: write {example}"
            )
        return value

    @field_validator("max_removed")
    @classmethod
    def _check_max_removed(cls, value: int | None, info: ValidationInfo) -> int | None:
        depth = context_of(info, "encoder_layers")
        removable = _count_removable(info)
        if value is not None and removable is not None and value > removable:
            raise ValueError(f"must not exceed the number of removable layers, {removable}")
        if value is not None and depth is not None and value >= depth:
            raise ValueError(f"must leave one of the encoder's {depth} layers")
        return value

    @field_validator("sampler")
    @classmethod
    def _check_grid_can_list(cls, value: Sampler, info: ValidationInfo) -> Sampler:
        size = _space_size(info)
        if value == "grid" and size is not None and size > MOST_LISTED:
            raise ValueError(
                f"grid can list at most {MOST_LISTED:,} candidates, got a space of {size:,}: lower max_removed, name fewer "
                'removable_layers or lora_ranks, or choose another sampler, such as "layer-sets"'
            )
        return value


def most_removed(max_removed: int | None, removable: int, encoder_layers: int) -> int:
    """The most layers that a candidate may lose: `search.max_removed`, by default half of the removable layers."""
    most = max_removed if max_removed is not None else max(1, removable // 2)
    return min(most, removable, encoder_layers - 1)


def _count_removable(info: ValidationInfo) -> int | None:
    """Number of removable layers; None if that is every layer of an encoder whose depth is not known yet."""
    layers = info.data.get("removable_layers", "all")
    depth: int | None = context_of(info, "encoder_layers")
    return depth if layers == "all" else len(layers)


def _space_size(info: ValidationInfo) -> int | None:
    """Number of candidates in the space; None if the depth is not known yet, or a key that it depends on is wrong."""
    removable = _count_removable(info)
    if removable is None or not {"removable_layers", "max_removed", "lora_ranks"} <= info.data.keys():
        return None
    depth = context_of(info, "encoder_layers") or removable + 1
    return count_candidates(removable, most_removed(info.data["max_removed"], removable, depth), len(info.data["lora_ranks"]))


def _check_indices(layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    """Return `layers`. Raises ValueError if one is negative, occurs twice, or is not a layer of the encoder."""
    Candidate(layers)
    depth = context_of(info, "encoder_layers")
    if depth is not None and any(i >= depth for i in layers):
        wrong = next(i for i in layers if i >= depth)
        raise ValueError(f"must lie in [0, {depth}), got {wrong}: the encoder has {depth} layers, and indices are zero-based")
    return layers
