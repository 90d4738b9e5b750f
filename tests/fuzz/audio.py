"""Audio files of all formats that libsndfile writes, damaged: each is read as the whole file, or named, or cannot be known.

    python -m tests.fuzz.audio [--seconds 60] [--seed 0]    random damage
    python -m tests.fuzz.audio --matrix                     each format, whole and in four kinds of damage

The samples of the undamaged file are the oracle. A damaged file must give the same samples, or an AudioError that names the
file. Other samples are right only where the reader says that the format tells neither length nor end, and where they are the
beginning of the whole.
"""

import argparse
import io
import random
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from prunesearch.speech.audio import AudioError, DecodedAudio, decode_audio
from tests.fuzz import FuzzResult

READ, NAMED, UNKNOWN, WRONG = "read", "named", "cannot be known", "wrong"
NOT_FILES = ("RAW", "SD2")  # without a header; with the header in another file
LENGTHLESS = ("IRCAM", "PAF", "PVF", "XI")  # what is lost in the middle of them is not missed
SECONDS = 2.0


@dataclass(frozen=True)
class Format:
    """A container and the encoding of its samples, by libsndfile's names."""

    container: str
    subtype: str

    def __str__(self) -> str:
        return f"{self.container} {self.subtype}"


def speech_like(rate: int, seconds: float = SECONDS) -> NDArray[np.float32]:
    """A gliding tone whose loudness comes and goes, over noise: all parts of it differ."""
    t = np.arange(int(rate * seconds)) / rate
    noise = np.random.default_rng(0).normal(0, 0.01, len(t))
    loudness = 0.3 + 0.2 * np.sin(2 * np.pi * 3 * t)
    return (loudness * np.sin(2 * np.pi * (200 + 100 * t) * t) + noise).astype(np.float32)


@cache
def whole_file(kind: Format) -> bytes | None:
    """The recording in this format; None where libsndfile cannot write it."""
    for rate in (16_000, 8_000, 44_100):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "whole"
            try:
                soundfile.write(path, speech_like(rate), rate, format=kind.container, subtype=kind.subtype)
                return path.read_bytes()
            except (soundfile.LibsndfileError, ValueError):
                continue
    return None


@cache
def all_formats() -> tuple[Format, ...]:
    """All pairs of container and subtype that libsndfile writes as one file with a header."""
    pairs = (Format(c, s) for c in soundfile.available_formats() for s in soundfile.available_subtypes(c) if c not in NOT_FILES)
    return tuple(pair for pair in pairs if whole_file(pair) is not None)


@cache
def whole_samples(kind: Format) -> NDArray[np.float32]:
    """What libsndfile decodes from the whole file, by the shortest way: it is independent of our reader."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        path.write_bytes(whole_file(kind) or b"")
        with soundfile.SoundFile(path) as file:
            file.seekable = lambda: False  # type: ignore[method-assign]  # soundfile seeks behind each read
            return file.read(file.frames, dtype="float32")


# The length fields of each container, found by the values that they must have in the whole file.


def length_fields(kind: Format, content: bytes) -> list[tuple[int, str]]:
    """(offset, struct code) of the field that tells the length of the audio."""
    container = kind.container
    if container in ("WAV", "WAVEX"):
        return [(content.index(b"data") + 4, "<I")]
    if container == "RF64":
        return [(content.index(b"ds64") + 16, "<Q")]
    if container == "W64":
        return [(content.index(b"data\xf3\xac\xd3\x11") + 16, "<Q")]
    if container == "AIFF":
        return [(content.index(b"SSND") + 4, ">I")]
    if container == "SVX":
        return [(content.index(b"BODY") + 4, ">I")]
    if container == "CAF":
        return [(content.index(b"data") + 4, ">Q")]
    if container == "MAT4":
        return [(content.index(b"wavedata") - 12, "<I")]
    if container == "MAT5":
        return [(content.index(b"wavedata") + 12, "<I")]
    fixed = {"AU": (8, ">I"), "AVR": (26, ">I"), "MPC2K": (30, "<I"), "WVE": (18, ">I"), "HTK": (0, ">I"), "XI": (298, "<I")}
    return [fixed[container]] if container in fixed else []


def with_length(kind: Format, content: bytes, zero: bool) -> bytes | None:
    """The file with its length field 0 or all ones; None for a format without one."""
    body = bytearray(content)
    if kind.container == "FLAC":  # 36 bits
        (value,) = struct.unpack(">Q", body[18:26])
        body[18:26] = struct.pack(">Q", value & ~((1 << 36) - 1) | (0 if zero else (1 << 36) - 1))
    elif kind.container == "NIST":
        at = content.index(b"sample_count -i ") + 16
        end = content.index(b"\n", at)
        body[at:end] = b"0" * (end - at) if zero else b"9" * (end - at)
    elif kind.container == "SDS":
        body[10:13] = b"\0\0\0" if zero else b"\x7f\x7f\x7f"
    elif kind.container == "VOC":
        body[27:30] = b"\0\0\0" if zero else b"\xff\xff\xff"
    elif kind.container == "MP3":
        at = next(content.find(tag) for tag in (b"Xing", b"Info") if tag in content) + 8
        body[at : at + 4] = b"\0" * 4 if zero else b"\xff" * 4
    elif fields := length_fields(kind, content):
        for offset, code in fields:
            size = struct.calcsize(code)
            body[offset : offset + size] = b"\0" * size if zero else b"\xff" * size
    else:
        return None
    return bytes(body)


def judged(content: bytes, kind: Format, folder: Path) -> tuple[str, str]:
    """READ, NAMED, UNKNOWN or WRONG, and the details of a wrong one."""
    path = folder / "recording.bin"
    path.write_bytes(content)
    try:
        found = decode_audio(path)
    except AudioError as error:
        fine = str(path) in str(error) and "\n" not in str(error)
        return (NAMED, str(error)) if fine else (WRONG, f"the message does not name the file: {error}")
    except Exception as error:  # the property is that there is none
        return WRONG, f"{type(error).__name__}: {error}"
    return _compared(found, kind)


def _compared(found: DecodedAudio, kind: Format) -> tuple[str, str]:
    expected = _at_16_khz(kind)
    ours = found.samples
    same = max(0, min(len(ours), len(expected)) - 400)  # the end may be a fragment of a block, and resampled
    is_equal = np.abs(ours[:same] - expected[:same]).max(initial=0.0) < 2e-3
    if abs(len(ours) - len(expected)) <= 0.02 * 16_000 and is_equal:
        return READ, ""
    if not found.end_is_known and is_equal:
        return UNKNOWN, ""
    return WRONG, f"{len(ours)} of {len(expected)} samples were read, and nothing was said"


@cache
def _at_16_khz(kind: Format) -> NDArray[np.float32]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole"
        soundfile.write(path, whole_samples(kind), _rate(kind), format="WAV", subtype="FLOAT")
        return decode_audio(path).samples


def _rate(kind: Format) -> int:
    return int(soundfile.info(io.BytesIO(whole_file(kind) or b"")).samplerate)


DAMAGE: dict[str, Callable[[Format, bytes], bytes | None]] = {
    "whole": lambda kind, content: content,
    "cut at 50 %": lambda kind, content: content[: len(content) // 2],
    "cut at 95 %": lambda kind, content: content[: len(content) * 95 // 100],
    "length 0": lambda kind, content: with_length(kind, content, zero=True),
    "length huge": lambda kind, content: with_length(kind, content, zero=False),
}


def matrix() -> Iterator[tuple[Format, dict[str, str]]]:
    """For each format, the outcome by kind of damage; `-` where the format has no length field."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in all_formats():
            content = whole_file(kind)
            assert content is not None
            row = {}
            for name, damage in DAMAGE.items():
                damaged = damage(kind, content)
                outcome, detail = ("-", "") if damaged is None else judged(damaged, kind, Path(folder))
                row[name] = f"{outcome}: {detail}" if outcome == WRONG else outcome
            yield kind, row


def print_matrix() -> int:
    """Print the matrix; returns the number of wrong outcomes."""
    print("".join(f"{title:<17}" for title in ("format", "", *DAMAGE)))
    wrong = 0
    for kind, row in matrix():
        print("".join(f"{cell:<17}" for cell in (kind.container, kind.subtype, *row.values())))
        wrong += sum(cell.startswith(WRONG) for cell in row.values())
    print(f"{len(all_formats())} formats; wrong: {wrong}")
    return wrong


def mutated(rng: random.Random, kind: Format) -> tuple[str, bytes]:
    """A description, and the damaged file."""
    content = whole_file(kind)
    assert content is not None
    choice = rng.randrange(6)
    if choice == 0:
        at = rng.randrange(len(content))
        return f"cut at byte {at}", content[:at]
    if choice == 1:
        zero = rng.random() < 0.5
        return f"length {'0' if zero else 'huge'}", with_length(kind, content, zero) or content
    if choice == 2:
        junk = rng.randbytes(rng.choice((1, 10, 500)))
        return f"{len(junk)} random bytes behind it", content + junk
    if choice == 3:
        zero, at = rng.random() < 0.5, rng.randrange(len(content) // 4, len(content))
        return f"length {'0' if zero else 'huge'} and cut at byte {at}", (with_length(kind, content, zero) or content)[:at]
    if choice == 4 and kind.container not in LENGTHLESS:
        at = rng.randrange(len(content) // 4, len(content) * 3 // 4)
        lost = len(content) // 8
        return f"{lost} bytes lost at byte {at}", content[:at] + content[at + lost :]
    return "an ID3 tag before it", b"ID3\3\0\0\0\0\0\x14" + b"\0" * 20 + content


def fuzz(seed: int, seconds: float | None = None, count: int | None = None) -> FuzzResult:
    """Damage files of all formats at random, until `seconds` have passed or `count` have been tried."""
    rng, result, begin = random.Random(seed), FuzzResult(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while (count is None or result.tried < count) and (seconds is None or time.monotonic() - begin < seconds):
            kind = rng.choice(all_formats())
            what, content = mutated(rng, kind)
            outcome, detail = judged(content, kind, Path(folder))
            result.tried += 1
            result.read += outcome in (READ, UNKNOWN)
            result.named += outcome == NAMED
            if outcome == WRONG:
                result.wrong.append(f"{kind}, {what}: {detail}")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    if arguments.matrix:
        raise SystemExit(min(1, print_matrix()))
    found = fuzz(arguments.seed, arguments.seconds)
    print(f"{found.tried} tried, {found.read} read, {found.named} named, {len(found.wrong)} wrong")
    print(*found.wrong, sep="\n")
    raise SystemExit(min(1, len(found.wrong)))
