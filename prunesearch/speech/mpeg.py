"""The frames of an MPEG audio file (ISO 11172-3 and 13818-3), counted: a file without a Xing frame does not tell its length."""

from collections.abc import Iterator
from dataclasses import dataclass

from prunesearch.speech.layout import AudioFile, Layout, Part

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version: 1, 2, 2.5
_KILOBITS = {  # by (is version 1, layer)
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclass(frozen=True)
class _Frame:
    start: int
    size: int  # bytes
    header: bytes
    kilobits: int
    side_info: int  # offset of a Xing or Info tag in the frame

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def kind(self) -> tuple[int, int]:
        """Version, layer and rate: the same in all frames of a stream."""
        return self.header[1] & 0xFE, self.header[2] & 0x0C


def mpeg_layout(file: AudioFile) -> Layout | None:
    """None if there is no MPEG frame at the beginning. The unit of the layout's sizes is a frame.

    libsndfile reads as many frames as a Xing frame tells or, without one, as the first frames' bit rate makes likely. So a
    file without a Xing frame, or with one that is wrong, is decoded with an Info frame that tells how many frames there are.
    """
    content = file.content
    frames = list(_frames(content))
    if not frames or frames[0].start > 0:
        return None
    first = frames[0]
    tag = first.start + first.side_info
    tagged = content[tag : tag + 4] in (b"Xing", b"Info") and len(content) >= tag + 16
    announced = int.from_bytes(content[tag + 8 : tag + 12], "big") if tagged and content[tag + 7] & 1 else None
    body = [f for f in frames[tagged:] if f.end <= len(content)]
    if not body:
        return Layout(announced, 0)
    incomplete = frames[-1].end > len(content)
    one_rate = len({f.kilobits for f in frames}) == 1
    if announced == len(body) + 1:  # some encoders count the Xing frame
        announced = len(body)
    if announced == len(body) or (announced is None and one_rate and not tagged):
        parts: tuple[Part, ...] = ()
    elif announced is not None:  # the tag also holds the encoder's delay: it stays
        replaced = [(tag + 8, len(body).to_bytes(4, "big"))]
        if content[tag + 7] & 2:  # it tells the size of the stream, too: mpg123 would print a warning
            replaced.append((tag + 12, len(content).to_bytes(4, "big")))
        parts = (Part(0, file.size, replaced=tuple(replaced)),)
    else:
        parts = (Part(body[0].start, file.size, head=_info_frame(first, len(body))),)
    if announced is None or announced in (0, 0xFFFFFFFF):
        return Layout(None, len(body), parts, "its last frame is not complete" if incomplete else None)
    return Layout(max(announced, len(body)), len(body), parts)


def _info_frame(like: _Frame, count: int) -> bytes:
    """A frame of silence that tells the number of frames behind it, as encoders write it for a constant bit rate."""
    body = bytearray(like.size)
    body[:4] = like.header[0], like.header[1] | 1, *like.header[2:]  # no checksum
    at = like.side_info
    body[at : at + 12] = b"Info" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return bytes(body)


def _frames(content: bytes) -> Iterator[_Frame]:
    """All frames of the first one's kind. Other bytes, such as tags at the end, are skipped."""
    at, kind = 0, None
    while (at := content.find(b"\xff", at)) >= 0:
        frame = _frame(content[at : at + 4], at)
        if frame is None or (kind is not None and frame.kind != kind) or not _goes_on(content, frame, at):
            at += 1
            continue
        kind = frame.kind
        yield frame
        at = frame.end


def _goes_on(content: bytes, frame: _Frame, at: int) -> bool:
    """Whether another frame, a tag, or the end of the file follows the frame."""
    behind = content[frame.end : frame.end + 4]
    if len(behind) < 4 or behind[:3] == b"TAG" or behind == b"APET" or behind == b"LYRI":
        return True
    after = _frame(behind, frame.end)
    return after is not None and after.kind == frame.kind


def _frame(header: bytes, start: int) -> _Frame | None:
    """The frame that a 4-byte header describes; None if it is no header, or one of a free format."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)
    index, rate_index, padding = header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version == 1 or layer == 4 or index in (0, 15) or rate_index == 3:
        return None
    kilobits, rate = _KILOBITS[version == 3, layer][index - 1], _RATES[version][rate_index]
    if layer == 1:
        size = (12 * 1000 * kilobits // rate + padding) * 4
    else:
        size = (72 if layer == 3 and version != 3 else 144) * 1000 * kilobits // rate + padding
    mono = header[3] >> 6 == 3
    side_info = 4 + ((17 if mono else 32) if version == 3 else (9 if mono else 17))
    return _Frame(start, size, header, kilobits, side_info)
