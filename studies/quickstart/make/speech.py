"""Synthetic speakers: a phrase, said by espeak-ng in one of many voices, in a room, with noise. Mono, 16 kHz.

A *voice variant* of espeak-ng changes formants, breathiness, tremor and pitch range. Its own variants are dealt to the
splits once and for all, so that dev and test are spoken by voices which nothing was ever trained on; training also
hears hundreds of variants that are drawn at random (`made_up_variant`).
"""

import io
import os
import random
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000

ACCENTS = {
    "da": ("da",),
    "nl": ("nl",),
    "en": ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc"),  # espeak-ng 1.51 ignores the variant of "en-gb"
}

# Variants that stay intelligible; the whispered, demonic and effect voices are left out.
VARIANTS = {
    "test": "Andy Annie f3 gustave Hugo klatt3 linda m4 norbert pedro steph".split(),
    "dev": "ed f5 iven3 john klatt5 m6 robert sandro Lee".split(),
    "train": (
        "adam Alex Andrea antonio aunty belinda benjamin boris caleb david Denis Diogo edward edward2 Gene Gene2 announcer "
        "Henrique iven iven2 iven4 Jacky kaukovalta marcelo Marco Mario max Michael michel miguel Mike Nguyen pablo paul "
        "quincy rob steph2 steph3 anika f1 f2 f4 grandma grandpa klatt klatt2 klatt4 klatt6 m1 m2 m3 m5 m7 m8 shelby "
        "travis victor robosoft robosoft3 robosoft5"
    ).split(),
}


MADE_UP = 200  # espeak-ng takes 349 voices in all


def made_up_variant(seed: int) -> str:
    """A voice file of espeak-ng: a throat of random size, with formants, breath and tremor around the usual."""
    rng = random.Random(seed)
    size, pitch = rng.uniform(0.84, 1.28), rng.uniform(65, 210)
    lines = ["language variant", f"name made-up{seed}", f"pitch {pitch:.0f} {pitch * rng.uniform(1.15, 1.6):.0f}"]
    for formant in range(9):  # frequency, strength and width in per cent
        own = rng.uniform(0.93, 1.07) if formant < 4 else 1.0
        lines.append(f"formant {formant} {100 * size * own:.0f} {rng.uniform(55, 140):.0f} {rng.uniform(60, 160):.0f}")
    for chance, line in (
        (0.4, f"roughness {rng.randint(0, 4)}"),
        (0.4, f"flutter {rng.randint(0, 10)}"),
        (0.5, f"voicing {rng.randint(60, 130)}"),
        (0.5, f"consonants {rng.randint(70, 130)} {rng.randint(70, 130)}"),
        (0.3, f"echo {rng.randint(20, 140)} {rng.randint(1, 15)}"),
        (0.2, "breath " + " ".join(str(rng.randint(0, 8)) for _ in range(8))),
        (0.2, f"klatt {rng.randint(1, 6)}"),
        (0.3, f"intonation {rng.randint(1, 4)}"),
        (0.4, "stressAmp " + " ".join(str(rng.randint(14, 28)) for _ in range(8))),
    ):
        if rng.random() < chance:
            lines.append(line)
    return "\n".join(lines) + "\n"


@cache
def voice_folder() -> tempfile.TemporaryDirectory:
    """espeak-ng's data (as links, other languages left out) with the made-up variants beside its own."""
    about = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout
    data = Path(about.split("Data at:")[1].strip())
    folder = tempfile.TemporaryDirectory(prefix="voices")
    for directory, _, files in os.walk(data):
        there = Path(folder.name, "espeak-ng-data", os.path.relpath(directory, data))
        there.mkdir()
        for file in files:
            if not {"lang", "mb"} & set(there.parts) or file.startswith(("da", "nl", "en")):
                (there / file).symlink_to(Path(directory, file))
    for seed in range(MADE_UP):
        Path(folder.name, "espeak-ng-data", "voices", "!v", f"made-up{seed}").write_text(made_up_variant(seed))
    return folder


@dataclass(frozen=True)
class Voice:
    """A speaker: espeak-ng's accent and variant, words per minute and pitch (0 to 99)."""

    accent: str
    variant: str
    speed: int
    pitch: int

    @classmethod
    def draw(cls, language: str, split: str, rng: random.Random) -> "Voice":
        variant = rng.choice(VARIANTS[split])
        if split == "train" and rng.random() < 0.6:
            variant = f"made-up{rng.randrange(MADE_UP)}"
        return cls(rng.choice(ACCENTS[language]), variant, rng.randint(135, 190), rng.randint(25, 75))


def say(text: str, voice: Voice) -> np.ndarray:
    """The clean recording, float32 in [-1, 1], (samples,)."""
    command = ["espeak-ng", f"--path={voice_folder().name}", "-v", f"{voice.accent}+{voice.variant}", "--stdout"]
    command += ["-s", str(voice.speed), "-p", str(voice.pitch), text]
    wav = subprocess.run(command, check=True, capture_output=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    samples = soxr.resample(samples, rate, SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(samples) > 1e-3)
    return samples[max(0, loud[0] - 800) : loud[-1] + 1600]


def _fast_length(samples: int) -> int:
    return 1 << (samples - 1).bit_length()


def in_a_room(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Convolved with exponentially decaying noise: a room of 0.1 to 0.4 s reverberation time (Polack's model)."""
    seconds = rng.uniform(0.1, 0.4)
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    response = rng.standard_normal(len(t)) * np.exp(-6.9 * t / seconds) * rng.uniform(0.02, 0.08)
    response[0] = 1.0
    size = _fast_length(len(samples) + len(response) - 1)
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(response, size), size)
    return wet[: len(samples)]


def with_noise(samples: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """Coloured noise (spectrum 1/f^a, a from 0 to 1.5) at the given signal-to-noise ratio."""
    spectrum = np.fft.rfft(rng.standard_normal(_fast_length(len(samples))))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** (rng.uniform(0, 1.5) / 2)
    noise = np.fft.irfft(spectrum)[: len(samples)]
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** (-decibels / 20)
    return samples + noise


def another_throat(samples: np.ndarray, factor: float) -> np.ndarray:
    """Resampled, so that pitch, formants and speed all change by the factor: a speaker of another size."""
    return soxr.resample(samples, SAMPLE_RATE * factor, SAMPLE_RATE)


def write_opus(file: Path | io.BytesIO, samples: np.ndarray) -> None:
    """About 12 kbit/s: speech stays clear, and the whole corpus fits in a few megabytes."""
    soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.976)


def through_opus(samples: np.ndarray) -> np.ndarray:
    """As it comes back from a file of the corpus."""
    file = io.BytesIO()
    write_opus(file, samples)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def record(text: str, language: str, split: str, rng: random.Random, noise: tuple[float, float]) -> tuple[np.ndarray, Voice]:
    """One recording of the phrase by a voice of the split, float32 (samples,), peak at 0.7; and who spoke."""
    voice = Voice.draw(language, split, rng)
    generator = np.random.default_rng(rng.randrange(2**32))
    samples = with_noise(in_a_room(say(text, voice), generator), rng.uniform(*noise), generator)
    return (0.7 * samples / np.abs(samples).max()).astype(np.float32), voice
