"""Keywords in XMP files: what programs for photographs read, set without touching anything else in it
(`sidecars.py` writes the file).

The same keywords stand in four properties, since each program reads its own first: `dc:subject` (all of them),
`lr:hierarchicalSubject` (Lightroom, darktable, immich), `digiKam:TagsList` (digiKam), `MicrosoftPhoto:LastKeywordXMP`
(Windows).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import escape

from ..data.text import xml_text

RDF, META = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "adobe:ns:meta/"
EMPTY_XMP = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    f'<x:xmpmeta xmlns:x="{META}">\n <rdf:RDF xmlns:rdf="{RDF}">\n  <rdf:Description rdf:about=""/>\n </rdf:RDF>\n'
    "</x:xmpmeta>\n"
)
# Prefix, namespace, name and kind of list of each property.
KEYWORDS = (
    ("dc", "http://purl.org/dc/elements/1.1/", "subject", "Bag"),
    ("lr", "http://ns.adobe.com/lightroom/1.0/", "hierarchicalSubject", "Bag"),
    ("digiKam", "http://www.digikam.org/ns/1.0/", "TagsList", "Seq"),
    ("MicrosoftPhoto", "http://ns.microsoft.com/photo/1.0/", "LastKeywordXMP", "Bag"),
)
# Some programs write Microsoft's namespace without the last stroke; Windows and Exiv2 write it as above.
_NAMES = frozenset(f"{spelling} {name}" for _, uri, name, _ in KEYWORDS for spelling in (uri, uri.rstrip("/")))
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, Char


def with_keywords(data: bytes, labels: Sequence[str], path: Path) -> bytes:
    """An XMP file with these keywords in place of its own, in its own encoding; comments, processing instructions and
    all that is not a keyword stay as they are, letter by letter. Characters that XML forbids are left out of keywords.

    Raises:
        ValueError: no XMP, in words that follow the file's name or with it.
    """
    text, encoding, mark = xml_text(data, path)
    utf8 = text.encode()
    spans, opening = _find(utf8)
    indent = re.search(rb"[ \t]*$", utf8[: opening[0]])[0].decode()
    block = "".join(_property(*each, labels, indent + " ") for each in KEYWORDS)
    begin, end = opening
    tag = utf8[begin:end]
    pieces, place = [], 0
    edits = [(first, last, b"") for first, last in spans]
    if tag.endswith(b"/>"):
        name = re.match(rb"<([^\s/>]+)", tag)[1]
        closed = tag[:-2].rstrip() + b">" + f"\n{block}{indent}".encode() + b"</" + name + b">"
        edits.append((begin, end, closed))
    else:
        edits.append((end, end, f"\n{block.rstrip()}".encode()))
    for first, last, new in sorted(edits):
        pieces += [utf8[place:first], new]
        place = last
    result = b"".join([*pieces, utf8[place:]]).decode()
    return mark + result.encode(encoding, errors="xmlcharrefreplace")


def _property(prefix: str, uri: str, name: str, kind: str, labels: Sequence[str], indent: str) -> str:
    items = "".join(f"{indent}  <rdf:li>{escape(_FORBIDDEN.sub('', label))}</rdf:li>\n" for label in labels)
    return (
        f'{indent}<{prefix}:{name} xmlns:{prefix}="{uri}">\n{indent} <rdf:{kind} xmlns:rdf="{RDF}">\n{items}'
        f"{indent} </rdf:{kind}>\n{indent}</{prefix}:{name}>\n"
    )


def _find(utf8: bytes) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The places of all keyword properties, with the blanks before them, and of the tag that opens the first
    rdf:Description."""
    parser = expat.ParserCreate("utf-8", " ")
    stack: list[tuple[str, int]] = []
    spans, openings = [], []

    def start(name: str, _) -> None:
        stack.append((name, parser.CurrentByteIndex))
        if name == f"{RDF} Description" and len(stack) > 1 and stack[-2][0] == f"{RDF} RDF":
            begin = parser.CurrentByteIndex
            openings.append((begin, _tag_end(utf8, begin)))

    def end(name: str) -> None:
        _, begin = stack.pop()
        if name in _NAMES and stack and stack[-1][0] == f"{RDF} Description":
            last = _tag_end(utf8, begin)
            if not utf8[:last].endswith(b"/>"):
                last = _tag_end(utf8, parser.CurrentByteIndex)
            blanks = len(utf8[:begin]) - len(utf8[:begin].rstrip(b" \t\r\n"))
            spans.append((begin - blanks, last))

    def refuse(*_) -> None:
        raise ValueError("it has a document type")

    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = start, end, refuse
    try:
        parser.Parse(utf8, True)
    except expat.ExpatError as error:
        raise ValueError(str(error)) from error
    if not openings:
        raise ValueError("it holds no rdf:Description")
    return spans, openings[0]


def _tag_end(utf8: bytes, begin: int) -> int:
    """Where a tag ends: at the first > outside of quotes."""
    return re.compile(rb"<(?:[^>\"']|\"[^\"]*\"|'[^']*')*>").match(utf8, begin).end()
