"""Fuzz targets: structural mutations of what comes in, and what must be true of each."""

from dataclasses import dataclass, field


@dataclass
class FuzzResult:
    """`wrong`: inputs that were neither read correctly nor named, one line each."""

    tried: int = 0
    read: int = 0
    named: int = 0
    wrong: list[str] = field(default_factory=list)
