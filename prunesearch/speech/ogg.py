"""The pages of an Ogg file (RFC 3533): where its streams begin and end, and whether pages are missing."""

from collections.abc import Iterator
from dataclasses import dataclass

from prunesearch.speech.layout import AudioFile, Layout, Part

_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags of a page


@dataclass(frozen=True)
class _Page:
    start: int
    end: int
    flags: int
    stream: int  # serial number
    number: int


def ogg_layout(file: AudioFile) -> Layout:
    """Streams one behind the other (a chained file) become parts. A file whose streams lack their end has a problem.

    A gap in the pages' numbers is a problem, too.
    """
    pages = list(_pages(file.content))
    links: list[list[_Page]] = []
    for page in pages:
        if page.flags & _FIRST and (not links or not links[-1][-1].flags & _FIRST):
            links.append([])
        if links:
            links[-1].append(page)
    problem = next((found for link in links if (found := _problem(link))), None)
    if pages and pages[-1].end > file.size:
        problem = "its last page is not complete"
    parts = tuple(Part(link[0].start, link[-1].end) for link in links) if len(links) > 1 else ()
    return Layout(parts=parts, problem=problem, marked_end=True)


def _problem(link: list[_Page]) -> str | None:
    """What is wrong with the pages of one link: each of its streams must have all pages, from the first to the last."""
    numbers: dict[int, int] = {}
    for page in link:
        if page.stream in numbers and page.number != numbers[page.stream] + 1:
            return f"page {numbers[page.stream] + 1} is missing"
        numbers[page.stream] = page.number
    ended = {page.stream for page in link if page.flags & _LAST}
    begun = {page.stream for page in link if page.flags & _FIRST}
    return "its last page is not marked as the end of the stream" if begun - ended else None


def _pages(content: bytes) -> Iterator[_Page]:
    """All pages; bytes between them are skipped."""
    at = content.find(b"OggS")
    while at >= 0 and at + 27 <= len(content):
        count = content[at + 26]
        sizes = content[at + 27 : at + 27 + count]
        end = at + 27 + count + sum(sizes)
        serial = int.from_bytes(content[at + 14 : at + 18], "little")
        number = int.from_bytes(content[at + 18 : at + 22], "little")
        yield _Page(at, end, content[at + 5], serial, number)
        at = content.find(b"OggS", end)
