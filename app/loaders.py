"""Files to documents: decode, convert to Markdown, normalise.

Markdown and plain text are decoded here, so that what goes wrong can be said precisely; HTML, PDF and Word files are
converted by markitdown. Whatever goes wrong comes out as one line that says what to do: libraries' errors are
translated in one place, `_border`.
"""

import codecs
import io
import itertools
import json
import logging
import math
import re
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import yaml

from app.domain import Document, Metadata, Scalar
from app.errors import TooLarge, UnreadableFile

CLEANER_VERSION = 1
"""Names how text is normalised; raised with `normalise`, it makes services refuse collections written before."""
NO_METADATA: Metadata = {}

MAX_DOCX_XML_BYTES = 20 * 2**20
"""Unpacked XML of a Word file. Its parser takes 40 times as much memory and 3 s per MiB; a novel has 10 MiB."""
MAX_DOCX_BYTES = 200 * 2**20
"""Everything unpacked, pictures too."""

MAX_DOCX_PARTS = 10_000
"""Of a Word file; the list alone of half a million would take 400 MB."""
MAX_PDF_BYTES = 100 * 2**20
"""Unpacked, without pictures, which nobody unpacks; a book of 1,000 pages has 10 MiB."""
MAX_LINE_BYTES = 25 * 2**20
"""Of a file that holds a document a line."""

MAX_TITLE_CHARACTERS = 300
ADDRESS_KEYS = ("link", "url", "source")
"""Where a document's address is looked for, best first."""


@dataclass(frozen=True, slots=True)
class _Page:
    """What a file says, before it is normalised."""

    text: str
    title: str = ""
    fallback_title: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


class _ReadError(Exception):
    """Why something cannot be read; `_border` puts the name in front."""


def load_file(
    name: str, content: bytes, *, document_id: str | None = None, metadata: Metadata = NO_METADATA, max_bytes: int
) -> Iterator[Document | UnreadableFile]:
    """Read one file by its suffix; the given metadata wins over the file's own.

    A `.jsonl` file holds many documents, read one by one, and may hold bad lines: those come as errors in their place.
    Any other file gives exactly one document, or raises.
    """
    suffix = PurePath(name).suffix.lower()
    with _border(_one_line(name)):
        _check(name, suffix, content, max_bytes)
        if suffix == JSONL:
            return _load_jsonl(name, content, document_id, metadata)
        page = READERS[suffix](content)
        text = normalise(page.text)
        if not re.search(r"\w", text):
            raise _ReadError(f"holds no text{NO_TEXT_HINTS.get(suffix, ': there is nothing in it to search')}")
    fallback_title = page.fallback_title or PurePath(name).stem
    return iter([_document(document_id or _clean(name), page, text, fallback_title, metadata)])


def too_large(name: str, num_bytes: int, max_bytes: int) -> TooLarge:
    """Say that a file is over the limit."""
    size, limit = num_bytes / 2**20, max_bytes / 2**20
    return TooLarge(f"{name}: has {size:.1f} MiB, the limit is {limit:.1f} MiB: split it", param="file")


def walk(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Find the files below a folder, in order, with their path from the folder's name downwards; hidden ones not."""
    folder = folder.resolve()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder.parent)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts[1:]):
            yield relative, path


def iterate_jsonl(
    lines: Iterable[bytes], *, name: str = "", metadata: Metadata = NO_METADATA
) -> Iterator[Document | UnreadableFile]:
    """Read the evaluation format, one object {id, title, text, source, ...metadata} a line.

    A line that cannot be read becomes an error that names it, and the next one is read. So does one whose id stood in
    an earlier line: the first is kept.
    """
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        if not line:
            continue
        try:
            with _border(_one_line(f"{name} line {number}")):
                document = _read_record(line, metadata)
                first = numbers.setdefault(document.id, number)
                if first != number:
                    raise _ReadError(f"repeats the id {document.id!r} of line {first}, which is kept")
        except UnreadableFile as error:
            yield error
        else:
            yield document


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Read lines; of one over `MAX_LINE_BYTES` only so much that it is seen to be over."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


# --- Normalising -----------------------------------------------------------------------------------------------------

LINE_END = re.compile(r"\r\n?|[\v\x85\u2028]")
PAGE_END = re.compile(r"[\f\u2029]")
# Control characters but tab and newline, soft hyphen, zero-width characters, direction marks, tags, lone surrogates:
# nobody sees them, and they part words that a search must find.
INVISIBLE = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff"
    r"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
CODE = re.compile(
    r"""
      # A fenced block, to its closing fence or to the end.
      ^[^\S\n]* (?P<fence>`{3,}(?=[^`\n]*$) | ~{3,}) .*
      (?: (?:\n.*)*? \n[^\S\n]* (?P=fence) [`~]* [^\S\n]*$ | (?:\n.*)* )
      # Inline code, within one paragraph; bounded, so that stray backticks cost no quadratic time.
    | (?<!`) (?P<ticks>`+) (?!`) (?: (?! \n[^\S\n]*(?:\n|`{3}|~{3}) ) [\s\S] ){1,1000}? (?<!`) (?P=ticks) (?!`)
    """,
    re.MULTILINE | re.VERBOSE,
)
BLANK_LINES = re.compile(r"\n{4,}")
# NFKC would turn 10² into 102, 1½ into 11⁄2 and a spacing accent into a space and an accent.
MEANINGFUL = ("<super>", "<sub>", "<fraction>", "<compat> 0020 ")
FENCE_LOOKALIKES = "\uff40\u1fef\uff5e"  # full-width grave and tilde, Greek varia: no code starts there


def normalise(text: str) -> str:
    """Make prose comparable (NFKC) and tidy, keep code as it is but for invisible characters; idempotent."""
    text = _clean(text)
    pieces = []
    position = 0
    for code in CODE.finditer(text):
        pieces += [_tidy(text[position : code.start()]), code.group()]
        position = code.end()
    pieces.append(_tidy(text[position:]).rstrip())
    return "".join(pieces).strip("\n")


def _clean(text: str) -> str:
    return INVISIBLE.sub("", LINE_END.sub("\n", PAGE_END.sub("\n\n", text)))


def _tidy(prose: str) -> str:
    # The last line may go on in inline code, so that its trailing space parts words.
    *lines, last = map(_fold, prose.split("\n"))
    return BLANK_LINES.sub("\n\n\n", "\n".join([*(line.rstrip() for line in lines), last]))


def _fold(line: str) -> str:
    """Apply NFKC except where it changes what is said."""
    if unicodedata.is_normalized("NFKC", line):
        return line
    runs = itertools.groupby(line, _keeps_form)
    return "".join("".join(run) if kept else unicodedata.normalize("NFKC", "".join(run)) for kept, run in runs)


def _keeps_form(character: str) -> bool:
    return character in FENCE_LOOKALIKES or unicodedata.decomposition(character).startswith(MEANINGFUL)


def _one_line(text: str) -> str:
    return " ".join(normalise(text).split())


# --- One file --------------------------------------------------------------------------------------------------------

TITLE_HEADING = re.compile(r"^# (.{1,300})|^([^\s|].{0,300})\n=+$", re.MULTILINE)
MARKUP = re.compile(r"\*+|`+|!?\[([^\]\n]*)\]\([^)\n]*\)|\{#[^}\n]*\}$")
FRONT_MATTER = re.compile(r"---[^\S\n]*\n(?=\S)(?P<yaml>(?:.*\n)*?)(?:---|\.\.\.)[^\S\n]*(?:\n|\Z)")
DATA_IMAGE = re.compile(r"!\[([^\]\n]{0,1000})\]\(data:[^)\s]*\)")
PDF_STREAM = re.compile(rb"(?<!end)stream\r?\n")
PDF_BLOCK_BYTES = 2**16
UNMAPPED_GLYPH = re.compile(r"\(cid:\d+\)")


@contextmanager
def _border(name: str) -> Iterator[None]:
    """Translate every error into one line: what is wrong with `name`, and what to do."""
    try:
        yield
    except TooLarge:
        raise
    except _ReadError as error:
        raise UnreadableFile(f"{name}: {error}", param="file") from None
    except Exception as error:
        cause = _one_line(f"{type(error).__name__} {error}")[:200]
        message = f"{name}: is damaged or not what its suffix says ({cause}); open it in its program and save it again"
        raise UnreadableFile(message, param="file") from error


def _check(name: str, suffix: str, content: bytes, max_bytes: int) -> None:
    if suffix != JSONL and suffix not in READERS:
        raise _ReadError(f"unknown kind of file; known are {', '.join(SUFFIXES)}")
    if len(content) > max_bytes:
        raise too_large(_one_line(name), len(content), max_bytes)
    if not content.strip():
        raise _ReadError("is empty")


def _document(id: str, page: _Page, text: str, fallback_title: str, metadata: Metadata) -> Document:
    url, fields = _take_address(page.fields)
    title = _one_line(page.title) or _first_heading(text) or _one_line(fallback_title)
    title = title[:MAX_TITLE_CHARACTERS].rstrip()
    return Document(id, title, text, url, {**_scalars(fields), **_scalars(metadata)})


def _first_heading(text: str) -> str:
    prose = CODE.sub(lambda code: "" if code["fence"] else code[0], text)
    headings = ((heading[1] or heading[2]).strip(" #") for heading in TITLE_HEADING.finditer(prose))
    return next(filter(None, (_one_line(MARKUP.sub(r"\1", heading)) for heading in headings)), "")


def _take_address(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Take out the first web address; a `source` that is not one ("BBC", "javascript:...") stays a field."""
    addresses = [(key, fields[key].strip()) for key in ADDRESS_KEYS if isinstance(fields.get(key), str)]
    url = next((address for _, address in addresses if re.fullmatch(r"https?://\S+", address)), "")
    repeated = {key for key, address in addresses if address == url}
    return url, {key: value for key, value in fields.items() if key not in repeated}


def _scalars(fields: Mapping[str, Any]) -> dict[str, Scalar]:
    """Keep what a filter can match: scalars, dates as ISO text, lists joined."""
    scalars = {_one_line(str(key)): _scalar(value) for key, value in fields.items()}
    return {key: value for key, value in scalars.items() if value is not None}


def _scalar(value: object) -> Scalar | None:
    match value:
        case bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else None
        case str():
            return unicodedata.normalize("NFKC", _clean(value)).strip()
        case date():
            return value.isoformat()
        case list() | tuple():
            items = (_scalar(item) for item in value if not isinstance(item, list | tuple))
            return ", ".join(str(item) for item in items if item is not None)
        case _:
            return None


def _decode(content: bytes) -> str:
    """Decode UTF-8, or UTF-16 that says so by its byte order mark."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16")
    else:
        text = _decode_utf8(content.removeprefix(codecs.BOM_UTF8))
    if "\0" in text:
        raise _ReadError("holds NUL bytes, so it is not text (or UTF-16 without its mark): save it as UTF-8 text")
    return text


def _decode_utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise _ReadError("is binary, not text: give it the suffix of what it is") from None
        byte, line = content[error.start], content.count(b"\n", 0, error.start) + 1
        raise _ReadError(
            f"byte 0x{byte:02X} in line {line} is not UTF-8; convert it, for example: iconv -f WINDOWS-1252 -t UTF-8"
        ) from None


def _read_text(content: bytes) -> _Page:
    return _Page(_decode(content))


def _read_markdown(content: bytes) -> _Page:
    text = LINE_END.sub("\n", _decode(content))
    matter = FRONT_MATTER.match(text)
    if not matter:
        return _Page(text)
    try:
        fields = yaml.safe_load(INVISIBLE.sub("", matter["yaml"]))
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f" in line {mark.line + 2}" if mark else ""
        raise _ReadError(f"its front matter is not valid YAML{line}: {_one_line(problem or str(error))}") from None
    if not isinstance(fields, dict):  # two thematic breaks around prose
        return _Page(text)
    return _Page(text[matter.end() :], _title(fields.pop("title", None)), fields=fields)


def _title(value: object) -> str:
    return str(value) if isinstance(value, str | int | float | date) else ""


def _read_html(content: bytes) -> _Page:
    from bs4.dammit import EncodingDetector

    try:
        text = _decode(content)
    except _ReadError:
        # An old page names its encoding inside; a guess from the bytes would be a guess.
        declared = EncodingDetector.find_declared_encoding(content, is_html=True, search_entire_document=True)
        if declared is None or declared.lower() in ("utf-8", "utf8"):
            raise
        text = content.decode(declared)
    return _convert(".html", text.encode())


def _read_pdf(content: bytes) -> _Page:
    from pdfminer.pdfdocument import PDFEncryptionError

    if b"%PDF-" not in content[:1024]:
        raise _ReadError("is not a PDF: give it the suffix of what it is")
    if any(size > MAX_PDF_BYTES for size in itertools.accumulate(_unpacked_sizes(content))):
        raise _ReadError(f"unpacks to more than {MAX_PDF_BYTES // 2**20} MiB: split it")
    try:
        page = _convert(".pdf", content)
    except PDFEncryptionError:
        raise _ReadError("is encrypted: save it without a password") from None
    return _Page(UNMAPPED_GLYPH.sub("", page.text))


def _unpacked_sizes(pdf: bytes) -> Iterator[int]:
    """Measure what the packed streams of a PDF unpack to, block by block, without holding it."""
    view = memoryview(pdf)
    for start in PDF_STREAM.finditer(pdf):
        position = start.end()
        dictionary = pdf[max(0, start.start() - 1000) : start.start()].rpartition(b"obj")[2]
        if b"/Image" in dictionary:
            continue
        unpacker = zlib.decompressobj()
        try:
            while not unpacker.eof and position < len(pdf):
                packed: bytes | memoryview = view[position : position + PDF_BLOCK_BYTES]
                position += len(packed)
                while packed and not unpacker.eof:
                    yield len(unpacker.decompress(packed, PDF_BLOCK_BYTES))
                    packed = unpacker.unconsumed_tail
        except zlib.error:
            continue  # Not packed this way, or damaged, which its reader will say.


def _read_docx(content: bytes) -> _Page:
    if content.startswith(b"\xd0\xcf\x11\xe0"):
        raise _ReadError("is an old .doc file or has a password: save it as .docx without one")
    if content.count(b"PK\x01\x02") > MAX_DOCX_PARTS:
        raise _ReadError(f"has more than {MAX_DOCX_PARTS} parts, which no Word file has: open it in its program")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = archive.infolist()
    xml = sum(part.file_size for part in parts if part.filename.lower().endswith((".xml", ".rels")))
    if xml > MAX_DOCX_XML_BYTES or sum(part.file_size for part in parts) > MAX_DOCX_BYTES:
        raise _ReadError(f"unpacks to more than {MAX_DOCX_XML_BYTES // 2**20} MiB of text: split it")
    return _convert(".docx", content)


def _convert(suffix: str, content: bytes) -> _Page:
    from markitdown import StreamInfo

    # What is written is indexed, not rendered: no backslashes in snake_case.
    plain = {"escape_asterisks": False, "escape_underscores": False, "escape_misc": False}
    stream_info = StreamInfo(extension=suffix, charset="utf-8")
    result = _converter(suffix).convert(io.BytesIO(content), stream_info, **plain)
    return _Page(DATA_IMAGE.sub(r"\1", result.markdown), fallback_title=result.title or "")


@cache
def _converter(suffix: str) -> Any:
    """Load one converter of markitdown (half a second), without its guessing of types, plugins and network."""
    from bs4 import XMLParsedAsHTMLWarning
    from markitdown import converters

    for library in ("pdfminer", "pdfplumber"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=XMLParsedAsHTMLWarning)
    warnings.filterwarnings("ignore", message="HTML document is too deeply nested")
    kinds = {".html": converters.HtmlConverter, ".pdf": converters.PdfConverter, ".docx": converters.DocxConverter}
    return kinds[suffix]()


READERS: Mapping[str, Callable[[bytes], _Page]] = {
    ".md": _read_markdown,
    ".markdown": _read_markdown,
    ".txt": _read_text,
    ".html": _read_html,
    ".htm": _read_html,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
JSONL = ".jsonl"
SUFFIXES = (*READERS, JSONL)
"""What `load_file` knows."""
NO_TEXT_HINTS = {".pdf": ", only pictures: run OCR on it first, for example with ocrmypdf"}


# --- Many documents in one file --------------------------------------------------------------------------------------


def _load_jsonl(
    name: str, content: bytes, document_id: str | None, metadata: Metadata
) -> Iterator[Document | UnreadableFile]:
    if document_id is not None:
        raise _ReadError("each line has its own id: leave out the id of the whole")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = _decode(content).encode()
    return iterate_jsonl(io.BytesIO(content), name=name, metadata=metadata)


def _read_record(line: bytes, metadata: Metadata) -> Document:
    if len(line) > MAX_LINE_BYTES:
        raise _ReadError(f"has more than {MAX_LINE_BYTES // 2**20} MiB: split its text")
    try:
        record = json.loads(_decode(line), parse_constant=lambda constant: None)
    except json.JSONDecodeError as error:
        raise _ReadError(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise _ReadError('is not a JSON object {"id": ..., "text": ...}')
    id, title, text = (record.pop(key, None) for key in ("id", "title", "text"))
    if not isinstance(id, str | int) or not str(id).strip():
        raise _ReadError('has no "id": give each line one')
    if not isinstance(text, str) or not re.search(r"\w", text):
        raise _ReadError('has no text in "text"')
    page = _Page(text, _title(title), fields=record)
    # Without a title of its own it has none: a file's name says nothing of one line.
    return _document(_clean(str(id)), page, normalise(text), "", metadata)
