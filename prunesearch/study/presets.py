"""Published recipes by name: `preset = "paper"` in a study file sets these keys where the file does not."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2603.27981 and the authors' released configurations
    "paper": {
        "projector": {"stack": 5, "hidden": 2048, "dropout": 0.1},
        "llm": {"lora_alpha_per_rank": 2.0, "lora_dropout": 0.1},
        "data": {"min_seconds": 0.5, "max_seconds": 30.0, "pad_to_seconds": 1.0},
        "text": {"normalizer": "paper"},
        "training": {
            "init": "scratch",
            "repair": "none",
            "interpolate": False,
            "learning_rate": 1e-4,
            "weight_decay": 0.01,
            "clip": 1.0,
            "warmup": 0.05,
            "final_learning_rate": 0.1,
        },
        "decoding": {"beams": 1, "test_beams": 2, "max_tokens": 128},
        "seed": 42,
    }
}


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The study file's table, with the keys of its preset where it has none. An unknown preset is left to validation."""
    preset = raw.get("preset")
    return _merged(PRESETS.get(preset, {}) if isinstance(preset, str) else {}, raw)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def overridden_keys(preset: str | None, study: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value differs from the preset's: dotted path -> (the preset's value, the study's value)."""
    return dict(_differences(PRESETS.get(preset or "", {}), study, ""))


def _differences(preset: dict[str, Any], own: dict[str, Any], path: str) -> list[tuple[str, tuple[Any, Any]]]:
    found = []
    for key, value in preset.items():
        if isinstance(value, dict):
            found += _differences(value, own[key], f"{path}{key}.")
        elif own[key] != value:
            found.append((path + key, (value, own[key])))
    return found
