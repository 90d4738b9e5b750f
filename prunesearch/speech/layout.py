"""What an audio file announces about its length, and what is there."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

STREAMED = 0x7FFE0000  # a writer that cannot seek back leaves this 32-bit value, or a larger one


@dataclass(frozen=True)
class AudioFile:
    """The bytes of a file."""

    content: bytes

    @property
    def size(self) -> int:
        return len(self.content)

    def at(self, offset: int, count: int) -> bytes:
        """The bytes from `offset` on: fewer than `count` at the end of the file."""
        return self.content[offset : offset + count]


@dataclass(frozen=True)
class Part:
    """The bytes `start` to `end` of a file, to be decoded on their own.

    head: bytes to put before them. replaced: (offset in the file, bytes) to write over them.
    """

    start: int
    end: int
    head: bytes = b""
    replaced: tuple[tuple[int, bytes], ...] = ()

    def of(self, file: AudioFile) -> bytes:
        """The bytes to decode."""
        body = bytearray(file.content[self.start : self.end])
        for offset, new in self.replaced:
            body[offset - self.start : offset - self.start + len(new)] = new
        return self.head + bytes(body)


@dataclass(frozen=True)
class Layout:
    """What a file's header announces, beside what is there.

    announced: the size of the audio, in the same unit as `present`; None if the header does not tell.
    present: the size of the audio that is there.
    frames: the number of samples per channel, where the header tells it besides the size.
    parts: what to decode, if not the file as it is: with a header that fits what is there, or several streams one by one.
    problem: the rule of the format that the file breaks, such as "its last page is not marked as the end of the stream".
    marked_end: the format marks the end of the audio, and the mark was checked.
    """

    announced: int | None = None
    present: int = 0
    parts: tuple[Part, ...] = ()
    problem: str | None = None
    marked_end: bool = False
    frames: int | None = None

    @property
    def length_is_known(self) -> bool:
        return self.announced is not None

    @property
    def end_is_known(self) -> bool:
        """Whether a file that was cut off would be noticed."""
        return self.marked_end or (self.announced, self.frames) != (None, None)

    @property
    def excess(self) -> float:
        """The announced size, as a multiple of what is there; 1 if nothing is missing or the size is unknown."""
        return max(1.0, self.announced / max(1, self.present)) if self.announced is not None else 1.0


def is_unknown(value: int, present: int, bits: int) -> bool:
    """Whether a length field holds what a writer leaves that does not know the length.

    That is 0, all ones (also those of a signed or a shorter field), and STREAMED and above. A field may announce as much as
    is there, whatever the value.
    """
    if value == 0:
        return True
    if value <= present:
        return False
    if bits < 32:
        return value == (1 << bits) - 1
    if bits == 32:
        return value >= STREAMED
    return value >= 1 << (bits - 2) or value in (0xFFFFFFFF, 0x7FFFFFFF)  # those of a 32-bit field, widened


@dataclass(frozen=True)
class LengthField:
    """A number in a header that tells the size of the audio, in units of `per`, plus `extra`.

    code: of the struct module. fixed: the value that the field must have instead, such as the size of the file.
    """

    offset: int
    code: str
    extra: int = 0
    per: int = 1
    fixed: int | None = None

    def replacement(self, there: int) -> tuple[int, bytes]:
        """The field's place, and its bytes for an audio of the size `there`."""
        value = there // self.per + self.extra if self.fixed is None else self.fixed
        return self.offset, struct.pack(self.code, min(value, (1 << 8 * struct.calcsize(self.code)) - 2))


def sized(
    file: AudioFile,
    start: int,
    value: int,
    fields: Sequence[LengthField],
    unit: int = 1,
    block: int = 1,
    bounded: bool = False,
) -> Layout:
    """The layout of a file whose audio begins at `start`, and whose header announces `value` units of `unit` bytes.

    fields: what a header that fits the file would hold; the first one is the field that `value` comes from.
    block: bytes that the encoding makes at once; of an incomplete one, noise would be decoded.
    bounded: libsndfile stops where the announced audio ends; of other formats, it reads what lies behind, too.
    """
    present = max(0, file.size - start)
    there = present // block * block // unit  # of an incomplete block, nothing is decoded
    unknown = is_unknown(value, there, 8 * struct.calcsize(fields[0].code))
    if not unknown and value * unit <= present:
        end = start + value * unit
        return Layout(value * unit, value * unit, (Part(0, end),) if end < file.size and not bounded else ())
    replaced = tuple(field.replacement(there) for field in fields)
    parts = (Part(0, file.size if bounded else start + there * unit, replaced=replaced),) if there else ()
    return Layout(None if unknown else value * unit, there * unit, parts)
