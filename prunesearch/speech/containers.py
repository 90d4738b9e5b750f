"""The length that each container announces, from its header. The formats are those that libsndfile reads."""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from prunesearch.speech.layout import STREAMED, AudioFile, Layout, LengthField, Part, is_unknown, sized
from prunesearch.speech.mpeg import mpeg_layout
from prunesearch.speech.ogg import ogg_layout

ALL_ONES = 0xFFFFFFFF  # RF64: the 64-bit size in `ds64` counts


def layout_of(file: AudioFile) -> Layout:
    """What the file announces. Of a format that announces nothing, or that is not known here, a layout of unknown length.

    The file begins with the audio format: see `without_tags`.
    """
    for magic, read in _FORMATS.items():
        if file.content.startswith(magic) and (found := _read_header(read, file)):
            return found
    return mpeg_layout(file) or Layout()


def _read_header(read: Callable[[AudioFile], Layout | None], file: AudioFile) -> Layout | None:
    try:
        return read(file)
    except (struct.error, ValueError):  # the file ends inside its header, or has no number where one belongs: libsndfile tells
        return None


def without_tags(content: bytes) -> bytes:
    """A file's content behind ID3v2 tags and their padding; each tag has four 7-bit digits of its size."""
    start = 0
    while (head := content[start : start + 10])[:3] == b"ID3" and len(head) == 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    return content[start:].lstrip(b"\0") if start else content


def _number(file: AudioFile, offset: int, code: str) -> Any:
    return struct.unpack(code, file.at(offset, struct.calcsize(code)))[0]


def _chunks(file: AudioFile, at: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset of its size, size) of each chunk of an IFF file; a chunk is padded to an even size."""
    while at + 8 <= file.size:
        name, size = struct.unpack(f"{order}4sI", file.at(at, 8))
        yield name, at + 4, size
        at += 8 + size + size % 2


def _are_chunks(file: AudioFile, at: int, order: str) -> bool:
    """Whether chunks with readable names fill the file from `at` to its end."""
    end = at
    for name, offset, size in _chunks(file, at, order):
        end = offset + 4 + size + size % 2
        if not all(0x20 <= c < 0x7F for c in name):
            return False
    return at < file.size and end in (file.size, file.size + 1)


def _wav(file: AudioFile) -> Layout | None:
    """RIFF, RIFX (big endian), and RF64/BW64, whose chunk `ds64` holds 64-bit sizes (EBU Tech 3306)."""
    order, wide, block = ">" if file.at(0, 4) == b"RIFX" else "<", None, 1
    whole = LengthField(4, f"{order}I", fixed=file.size - 8)
    for name, offset, size in _chunks(file, 12, order):
        if name == b"ds64":
            wide = offset + 4
        elif name == b"fmt ":
            block = max(1, _number(file, offset + 16, f"{order}H"))
        elif name == b"data":
            body = offset + 4
            if wide is not None and size in (0, ALL_ONES):
                fields = LengthField(wide + 8, "<Q"), LengthField(wide, "<Q", fixed=file.size - 8)
                return sized(file, body, _number(file, wide + 8, "<Q"), fields, block=block, bounded=True)
            if size == 0 and (body == file.size or _are_chunks(file, body, order)):
                return Layout(0, 0)  # the file holds no samples, and says so
            return sized(file, body, size, (LengthField(offset, f"{order}I"), whole), block=block, bounded=True)
    return None


def _w64(file: AudioFile) -> Layout | None:
    """Sony Wave64: chunks have 16-byte names, of which four are letters; sizes include the 24 bytes of name and size."""
    at, block = 40, 1
    while at + 24 <= file.size:
        name, size = file.at(at, 4), _number(file, at + 16, "<Q")
        if name == b"fmt ":
            block = max(1, _number(file, at + 36, "<H"))
        if name == b"data":
            fields = LengthField(at + 16, "<Q", extra=24), LengthField(16, "<Q", fixed=file.size)
            return sized(file, at + 24, size - 24 if 24 < size < 1 << 62 else size, fields, block=block)
        at += max(24, size + -size % 8)
    return None


def _form(file: AudioFile) -> Layout | None:
    """AIFF, AIFC, 8SVX and 16SV."""
    is_aiff, frames, encoding = file.at(8, 3) == b"AIF", None, b""
    for name, offset, size in _chunks(file, 12, ">"):
        if name == b"COMM":
            encoding, told = file.at(offset + 22, 4), _number(file, offset + 6, ">I")
            frames = None if is_unknown(told, 0, 32) or encoding in (b"ima4", b"GSM ") else told  # those count packets
        if name == (b"SSND" if is_aiff else b"BODY"):
            gap = 8 + min(_number(file, offset + 4, ">I"), file.size) if is_aiff else 0  # its two fields, and an offset
            value = size if is_unknown(size, file.size, 32) else max(0, size - gap)
            fields = LengthField(offset, ">I", extra=gap), LengthField(4, ">I", fixed=file.size - 8)
            if encoding == b"DWVW" and is_unknown(size, file.size, 32):
                return Layout(problem="of DWVW without a length, noise would be decoded behind the end")
            return replace(sized(file, offset + 4 + gap, value, fields, bounded=is_aiff), frames=frames)
    return None


def _caf(file: AudioFile) -> Layout | None:
    """Apple's Core Audio Format: 64-bit sizes, -1 for an unknown one. Samples follow a 4-byte edit count.

    A table of packets (`pakt`), which compressed audio has, tells the number of frames, too.
    """
    at, frames = 8, None
    while at + 12 <= file.size:
        name, size = struct.unpack(">4sQ", file.at(at, 12))
        if name == b"pakt":
            told = _number(file, at + 20, ">Q")
            frames = None if is_unknown(told, 0, 64) else told
        if name == b"data":
            value = size - 4 if 4 < size < 1 << 62 else size
            return replace(sized(file, at + 16, value, (LengthField(at + 4, ">Q", extra=4),), bounded=True), frames=frames)
        at += 12 + size
    return None


def _au(file: AudioFile) -> Layout | None:
    order = ">" if file.at(0, 4) == b".snd" else "<"
    return sized(file, _number(file, 4, f"{order}I"), _number(file, 8, f"{order}I"), (LengthField(8, f"{order}I"),))


def _avr(file: AudioFile) -> Layout | None:
    stereo, bits = struct.unpack(">HH", file.at(12, 4))
    unit = max(1, bits // 8) * (2 if stereo else 1)
    return sized(file, 128, _number(file, 26, ">I"), (LengthField(26, ">I"),), unit)


def _mpc(file: AudioFile) -> Layout | None:
    unit = 4 if _number(file, 21, "B") else 2
    return sized(file, 42, _number(file, 30, "<I"), (LengthField(30, "<I"), LengthField(26, "<I")), unit)


def _wve(file: AudioFile) -> Layout | None:
    return sized(file, 32, _number(file, 18, ">I"), (LengthField(18, ">I"),))


def _xi(file: AudioFile) -> Layout | None:
    """An instrument of FastTracker 2 with one sample."""
    return sized(file, 338, _number(file, 298, "<I"), (LengthField(298, "<I"),))


def _voc(file: AudioFile) -> Layout | None:
    """Blocks of a type and a 24-bit size; those of the types 1 and 9 hold samples behind 2 and 12 bytes. 0 ends the file."""
    at = _number(file, 20, "<H")
    while at + 4 <= file.size:
        kind, size = file.at(at, 1)[0], int.from_bytes(file.at(at + 1, 3), "little")
        if kind in (1, 9):
            extra = 2 if kind == 1 else 12
            present = max(0, file.size - at - 4 - extra)
            whole = min(present + extra, 0xFFFFFE).to_bytes(3, "little")
            if not is_unknown(size, present + extra, 24) and size <= present + extra:
                end = at + 4 + size + 1
                return Layout(size - extra, size - extra, (Part(0, end),) if end < file.size else ())
            announced = None if is_unknown(size, present + extra, 24) else size - extra
            return Layout(announced, present, (Part(0, file.size, replaced=((at + 1, whole),)),))
        at += 4 + size
    return None


def _nist(file: AudioFile) -> Layout | None:
    """NIST SPHERE: lines of name, type and value in a header of the size that its second line tells."""
    length = int(file.at(8, 8))
    header = file.at(0, length)
    values = {name: int(value) for name, value in re.findall(rb"^(\w+) -i (\d+)$", header, re.MULTILINE)}
    is_one_byte = re.search(rb"^sample_coding -s\d+ [au]-?law", header, re.MULTILINE)  # some writers tell 2 bytes nevertheless
    unit = (1 if is_one_byte else values.get(b"sample_n_bytes", 2)) * values.get(b"channel_count", 1)
    there = (file.size - length) // unit
    if (value := values.get(b"sample_count")) is None:
        return None
    unknown = is_unknown(value, there, 32)
    if not unknown and value <= there:
        end = length + value * unit
        return Layout(value, value, (Part(0, end),) if end < file.size else ())
    mended = header.replace(b"sample_count -i %d\n" % value, b"sample_count -i %d\n" % there).rstrip(b"\0 ")
    mended = mended.ljust(length)[:length]
    return Layout(None if unknown else value * unit, file.size - length, (Part(length, file.size, head=mended),))


def _sds(file: AudioFile) -> Layout | None:
    """MIDI Sample Dump Standard: a length in three 7-bit digits, and packets of 127 bytes with 120 of samples."""
    bits, length = file.at(6, 1)[0], file.at(10, 3)
    value = sum(digit << shift for digit, shift in zip(length, (0, 7, 14), strict=True))
    per_packet = 120 // (2 if bits < 15 else 3 if bits < 22 else 4)
    packets = (file.size - 21) // 127
    there = packets * per_packet
    unknown = value == 0 or value == (1 << 21) - 1
    if not unknown and value <= there:
        return Layout(value, there)
    digits = bytes(there >> shift & 0x7F for shift in (0, 7, 14))
    return Layout(None if unknown else value, there, (Part(0, file.size, replaced=((10, digits),)),))


def _mat4(file: AudioFile) -> Layout | None:
    """MATLAB 4: a matrix with the rate, then one of the samples; each has type, rows, columns and a name."""
    order = ">" if file.at(0, 2) == b"\0\0" and file.at(2, 2) != b"\0\0" else "<"
    at = 20 + _number(file, 16, f"{order}I") + 8
    kind, rows, columns, _, name = struct.unpack(f"{order}5I", file.at(at, 20))
    unit = rows * {0: 8, 1: 4, 2: 4, 3: 2, 4: 2, 5: 1}.get(kind % 100 // 10, 1)
    return sized(file, at + 20 + name, columns, (LengthField(at + 8, f"{order}I"),), unit)


def _mat5(file: AudioFile) -> Layout | None:
    """MATLAB 5: as 4, but a matrix is made of elements (type, size, content padded to 8 bytes): flags, shape, name, values."""
    order = "<" if file.at(126, 2) == b"IM" else ">"
    first = 136 + _number(file, 132, f"{order}I")  # behind the matrix with the rate
    shape = first + 8 + 16
    rows, columns = struct.unpack(f"{order}2I", file.at(shape + 8, 8))
    name = shape + 16
    values = name + 8 + (_number(file, name + 4, f"{order}I") + 7) // 8 * 8
    kind, size = struct.unpack(f"{order}2I", file.at(values, 8))
    unit = rows * {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8}.get(kind, 1)
    code = f"{order}I"
    fields = (
        LengthField(values + 4, code),
        LengthField(shape + 12, code, per=max(1, unit)),
        LengthField(first + 4, code, extra=values + 8 - (first + 8)),
    )
    by_shape = sized(file, values + 8, columns, (fields[1], fields[0], fields[2]), max(1, unit))
    by_size = sized(file, values + 8, size, fields)
    return by_shape if by_size.length_is_known and by_size.excess == 1 else by_size


def _flac(file: AudioFile) -> Layout | None:
    """FLAC streams, one behind the other. 36 bits of STREAMINFO hold the number of samples; 0 for an unknown one."""
    total = _number(file, 18, ">Q") & (1 << 36) - 1
    starts = [m.start() for m in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", file.content)]
    parts = tuple(Part(a, b) for a, b in zip(starts, [*starts[1:], file.size], strict=True)) if len(starts) > 1 else ()
    unknown = total == 0 or total >= STREAMED
    return Layout(None if unknown else 1, 1, parts)  # in units of the whole: libsndfile knows the number of samples


_FORMATS: dict[bytes, Callable[[AudioFile], Layout | None]] = {
    b"RIFF": _wav, b"RIFX": _wav, b"RF64": _wav, b"BW64": _wav, b"riff": _w64, b"FORM": _form, b"caff": _caf, b".snd": _au,
    b"dns.": _au, b"2BIT": _avr, b"\x01\x04": _mpc, b"ALawSoundFile**": _wve, b"Extended Instrument: ": _xi,
    b"Creative Voice File\x1a": _voc, b"NIST_1A\n": _nist, b"\xf0\x7e": _sds, b"fLaC": _flac, b"OggS": ogg_layout,
    b"MATLAB 5.0 MAT-file": _mat5, b"\0\0\0\0\1\0\0\0\1\0\0\0": _mat4, b"\0\0\x03\xe8\0\0\0\1": _mat4,
}  # fmt: skip
