"""Recordings that are not what their header says: each is read to its end, or named."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from prunesearch.asr.recognizer import windows
from prunesearch.asr.recordings import recordings
from prunesearch.speech.audio import AudioError, checked_samples, decode_audio, read_audio, seconds_of
from prunesearch.speech.corpus import checked_corpus
from prunesearch.speech.mpeg import _frames
from prunesearch.study.config import DecodingConfig, load_study
from prunesearch.study.errors import StudyError
from prunesearch.study.record import SplitResult, UtteranceResult, WordErrors
from prunesearch.training.decode import reached_limit, token_limit
from tests.conftest import write_study
from tests.fuzz.audio import NAMED, WRONG, Format, fuzz, judged, matrix, speech_like, whole_file, with_length


def silent(what: str, done: int, of: int) -> None:
    pass


def recording(folder: Path, kind: Format, name: str = "a.bin") -> Path:
    (folder / name).write_bytes(whole_file(kind) or b"")
    return folder / name


def test_no_format_is_read_in_part_without_a_word() -> None:
    rows = list(matrix())
    assert len(rows) > 100
    assert [(str(kind), row) for kind, row in rows if any(cell.startswith(WRONG) for cell in row.values())] == []
    assert all(row["whole"] == "read" for _, row in rows)


def test_files_that_are_damaged_at_random_are_read_or_named() -> None:
    found = fuzz(seed=1, count=300)
    assert found.wrong == []
    assert found.tried == 300
    assert min(found.read, found.named) > 30


OPUS, VORBIS, MP3, FLAC = (
    Format("OGG", "OPUS"),
    Format("OGG", "VORBIS"),
    Format("MP3", "MPEG_LAYER_III"),
    Format("FLAC", "PCM_16"),
)


@pytest.mark.parametrize("kind", [OPUS, VORBIS, FLAC, Format("MP3", "MPEG_LAYER_III")], ids=str)
def test_streams_one_behind_the_other_are_all_read(kind: Format, tmp_path: Path) -> None:
    one = read_audio(recording(tmp_path, kind))
    (tmp_path / "two.bin").write_bytes((whole_file(kind) or b"") * 2)
    both = read_audio(tmp_path / "two.bin")
    assert abs(len(both) - 2 * len(one)) < 0.15 * 16_000  # MP3: the encoder's delay lies between them


def ogg_pages(content: bytes) -> list[bytes]:
    return [b"OggS" + page for page in content.split(b"OggS")[1:]]


def test_an_ogg_file_without_its_last_page_or_one_in_the_middle_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.opus", speech_like(16_000, 12), 16_000, format="OGG", subtype="OPUS")
    pages = ogg_pages((tmp_path / "long.opus").read_bytes())
    assert len(pages) > 4
    for left, rule in ((pages[:-1], "not marked as the end"), (pages[:3] + pages[4:], "page 3 is missing")):
        (tmp_path / "cut.opus").write_bytes(b"".join(left))
        with pytest.raises(AudioError, match=f"cut.opus: .*{rule}"):
            read_audio(tmp_path / "cut.opus")


def vbr_mp3(path: Path) -> NDArray[np.float32]:
    """Write an MP3 of variable bit rate: a quiet beginning, then noise. Returns its samples."""
    noise = np.random.default_rng(0).normal(0, 0.2, 16_000 * 10)
    samples = np.concatenate([speech_like(16_000, 5) * 0.01, noise]).astype(np.float32)
    with soundfile.SoundFile(
        path, "w", 16_000, 1, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE", compression_level=0.5
    ) as file:
        file.write(samples)
    return samples


def test_a_vbr_mp3_without_its_xing_frame_is_read_to_its_end(tmp_path: Path) -> None:
    samples = vbr_mp3(tmp_path / "whole.mp3")
    content = (tmp_path / "whole.mp3").read_bytes()
    _, second, *_ = _frames(content)
    (tmp_path / "bare.mp3").write_bytes(content[second.start :])
    guessed = soundfile.info(tmp_path / "bare.mp3").duration
    assert abs(guessed - 15) > 0.5, "libsndfile's guess is wrong, or this tests nothing"
    assert len(read_audio(tmp_path / "whole.mp3")) == len(samples)
    bare = decode_audio(tmp_path / "bare.mp3")
    assert len(bare.samples) / 16_000 == pytest.approx(15, abs=0.2)
    assert not bare.end_is_known
    assert seconds_of(tmp_path / "bare.mp3") == pytest.approx(15, abs=0.2)
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=r"cut.mp3: is cut off or damaged after .* of 1[45]\.\d\d s.*ffmpeg"):
        read_audio(tmp_path / "cut.mp3")


def test_a_cut_file_is_named_with_announced_and_found_seconds(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(16_000, 4), 16_000)
    content = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(content[: 44 + 3 * 32_000])
    with pytest.raises(AudioError, match=r"a.wav: is cut off or damaged after 3\.00 of 4\.00 s; .*ffmpeg -i OLD -c copy NEW"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("kind", "length_is_huge", "lost"),
    [
        (Format("WAV", "MS_ADPCM"), False, 19),  # less than a block: libsndfile decodes none of the incomplete one
        (Format("W64", "MS_ADPCM"), False, 6),
        (Format("WAV", "IMA_ADPCM"), False, 6),
        (Format("AIFF", "DWVW_16"), True, 1200),  # libsndfile decodes noise behind the end
        (Format("MP3", "MPEG_LAYER_III"), False, 8764),  # the file ends inside its Xing tag
    ],
    ids=str,
)
def test_what_is_lost_from_the_last_block_is_named(kind: Format, length_is_huge: bool, lost: int, tmp_path: Path) -> None:
    content = whole_file(kind)
    assert content is not None
    damaged = (with_length(kind, content, zero=False) if length_is_huge else content) or b""
    outcome, detail = judged(damaged[: len(content) - lost], kind, tmp_path)
    assert outcome == NAMED, detail


@pytest.mark.parametrize("size", [0, 0x7FFE0000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_sizes_that_streaming_writers_leave_mean_unknown(size: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(16_000), 16_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    expected = read_audio(tmp_path / "a.wav")
    content[40:44] = size.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    found = decode_audio(tmp_path / "a.wav")
    np.testing.assert_array_equal(found.samples, expected)
    assert not found.end_is_known


def test_a_wav_file_that_is_empty_and_says_so_is_not_filled_with_its_other_chunks(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"LIST\x04\0\0\0INFO")
    with pytest.raises(AudioError, match="holds no samples"):
        read_audio(tmp_path / "a.wav")


def test_channels_that_cancel_each_other_are_read_from_the_loudest(tmp_path: Path) -> None:
    sound = speech_like(16_000)
    soundfile.write(tmp_path / "a.wav", np.stack([sound, -sound], 1), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(np.abs(read_audio(tmp_path / "a.wav")), np.abs(sound))
    other = np.random.default_rng(1).normal(0, 0.2, len(sound)).astype(np.float32)
    soundfile.write(tmp_path / "b.wav", np.stack([sound, other], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "b.wav"), (sound + other) / 2, atol=1e-6)


def test_names_that_are_not_utf_8_are_read_and_shown(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bl\xe5.opus"))
    path.write_bytes(whole_file(OPUS) or b"")
    assert len(read_audio(path)) == 32_000
    path.write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"bl\\xe5.opus: cannot be decoded") as caught:
        read_audio(path)
    assert str(caught.value).isascii()


def test_macos_companion_files_are_named_and_passed_over_in_folders(tmp_path: Path) -> None:
    recording(tmp_path, OPUS, "a.opus")
    (tmp_path / "._a.opus").write_bytes(b"\0\5\x16\7" + b"\0" * 200)
    with pytest.raises(AudioError, match="AppleDouble"):
        read_audio(tmp_path / "._a.opus")
    with recordings([str(tmp_path)]) as found:
        assert [p.name for p in found.values()] == ["a.opus"]


def test_a_missing_file_does_not_cost_the_others(tmp_path: Path) -> None:
    there = recording(tmp_path, OPUS, "a.opus")
    with recordings([str(there), str(tmp_path / "nowhere.wav")]) as found:
        assert len(found) == 2
    with pytest.raises(StudyError, match="no such file"), recordings([str(tmp_path / "nowhere.wav")]):
        pass


@pytest.mark.parametrize("samples", [1, 100, 200, 399])
def test_recordings_shorter_than_an_analysis_window_are_named(samples: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(16_000)[:samples], 16_000)
    with pytest.raises(AudioError, match="at least 25 ms"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("bad", [np.ones((2, 500), np.float32), np.ones(500, np.int16), np.full(500, np.nan), np.ones(10)])
def test_samples_that_a_caller_gives_are_checked(bad: NDArray[Any]) -> None:
    with pytest.raises(AudioError, match="samples: "):
        checked_samples(bad)


@pytest.mark.parametrize("more", [1, 20, 180, 500, 7_999, 8_000, 40_000])
def test_no_crumb_is_left_behind_a_window(more: int) -> None:
    longest = 8 * 16_000
    samples = np.ones(longest + more, np.float32) * np.linspace(1, 0, longest + more, dtype=np.float32)  # fades out
    parts = windows(samples, longest)
    assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])]
    assert parts[-1][1] == len(samples)
    assert all(8_000 <= b - a <= longest for a, b in parts)


def manifest(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "dev.jsonl")


def test_limits_hold_for_what_was_decoded(toy: Path, tmp_path: Path) -> None:
    for name, seconds in (("long", 7.0), ("short", 1.0), ("right", 1.5)):
        soundfile.write(tmp_path / f"{name}.wav", speech_like(16_000, seconds), 16_000)
    claims = {"long": 2.0, "short": 60.0, "right": 1.5}
    rows = [{"audio": f"{name}.wav", "text": "low", "duration": claim} for name, claim in claims.items()]
    data = {"dev": manifest(tmp_path, rows), "max_seconds": 4.0, "group": "audio"}
    config = load_study(write_study(tmp_path / "s", toy, data=data))
    corpus = checked_corpus(config, "dev", silent)
    assert {u.id: round(u.seconds, 2) for u in corpus.utterances} == {"short.wav": 1.0, "right.wav": 1.5}
    assert [(d.id, d.reason) for d in corpus.dropped] == [("long.wav", "lasts 7.00 s, outside 0.1 to 4 s")]


def test_recordings_longer_than_the_window_are_skipped_if_the_study_says_so(toy: Path, tmp_path: Path) -> None:
    for seconds in (1, 3):
        soundfile.write(tmp_path / f"{seconds}.wav", speech_like(16_000, seconds), 16_000)
    source = manifest(tmp_path, [{"audio": f"{s}.wav", "text": "low", "speaker": "a"} for s in (1, 3)])
    strict = load_study(write_study(tmp_path / "s", toy, data={"dev": source}))
    with pytest.raises(StudyError) as caught:
        checked_corpus(strict, "dev", silent, window_seconds=2.0)
    assert caught.value.lines[0].startswith("3.wav: lasts 3.00 s, longer than the encoder's window of 2 s")
    assert caught.value.lines[1:] == [
        "data.max_seconds: set it to at most 2",
        "data.skip_unreadable = true leaves them out",
    ]
    lenient = load_study(write_study(tmp_path / "l", toy, data={"dev": source, "skip_unreadable": True}))
    for _ in range(2):  # decoded, then from the stored report
        corpus = checked_corpus(lenient, "dev", silent, window_seconds=2.0)
        assert [u.id for u in corpus.utterances] == ["1.wav"]
        assert "window" in corpus.dropped[0].reason


def test_the_corpus_report_lists_recordings_whose_end_cannot_be_known(toy: Path, tmp_path: Path) -> None:
    recording(tmp_path, Format("IRCAM", "PCM_16"), "a.sf")
    recording(tmp_path, FLAC, "b.flac")
    (tmp_path / "c.flac").write_bytes(with_length(FLAC, whole_file(FLAC) or b"", zero=True) or b"")
    rows = [{"audio": name, "text": "low", "speaker": "a"} for name in ("a.sf", "b.flac", "c.flac")]
    config = load_study(write_study(tmp_path / "s", toy, data={"dev": manifest(tmp_path, rows)}))
    for _ in range(2):
        assert checked_corpus(config, "dev", silent).end_unknown == ["a.sf", "c.flac"]
    report = json.loads((config.run_folder / "corpus" / "dev.json").read_text())
    assert report["end_unknown"] == ["a.sf", "c.flac"]


def test_the_default_token_limit_follows_from_the_audios_length() -> None:
    assert token_limit(30.0, DecodingConfig()) == 30 * 12 + 8
    assert token_limit(30.0, DecodingConfig(max_tokens=128)) == 128
    assert token_limit(2.0, DecodingConfig()) == token_limit(2.0, DecodingConfig(max_tokens=128))


def test_hypotheses_that_end_at_their_token_limit_are_counted() -> None:
    end, pad = 2, 0
    assert reached_limit([5, 6, 7, pad], limit=3, ends=(end,))
    assert reached_limit([5, 6, 7, end], limit=3, ends=(end,))  # padded with its end of sequence
    assert not reached_limit([5, 6, end, pad], limit=3, ends=(end,))
    assert not reached_limit([5, 6], limit=3, ends=(end,))

    def result(reached: bool | None) -> UtteranceResult:
        return UtteranceResult(id="a", reference="a", hypothesis="a", errors=WordErrors(), reached_limit=reached)

    counted = SplitResult.of([result(True), result(False), result(False), result(False)])
    assert counted.token_limit_rate == 0.25
    assert SplitResult.of([result(True), result(None)]).token_limit_rate is None  # of a version that did not count
    assert SplitResult.pooled([counted, counted]).token_limit_rate == 0.25
    assert SplitResult.model_validate({"errors": {}, "utterances": 3}).token_limit_rate is None


def test_the_judge_of_the_fuzz_target_can_fail(tmp_path: Path) -> None:
    kind = Format("WAV", "PCM_16")
    soundfile.write(tmp_path / "half.wav", speech_like(16_000, 1), 16_000)
    assert judged((tmp_path / "half.wav").read_bytes(), kind, tmp_path)[0] == WRONG
