"""Forms of files: read piece by piece as they come, each file straight to disk."""

from collections.abc import AsyncIterator

from fastapi import HTTPException
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.durable import finish_in_thread
from app.errors import TooLarge
from app.uploads import UploadWriter

MAX_FILES = 10_000
MAX_FIELDS = 100
MAX_FIELD_BYTES = 2**20
BLOCK_BYTES = 2**20
"""Gathered before it is parsed and written, in one call to a thread."""
BROKEN = "the form is broken: send multipart/form-data as an HTTP client writes it"


async def receive_form(
    content_type: str, body: AsyncIterator[bytes], writer: UploadWriter, *, field: str = "files"
) -> dict[str, str]:
    """Write the files of one field of the form; give its other fields, of which the last of a name counts.

    Raises:
        HTTPException: it is no form, or ends too early.
        TooLarge: it has too many parts, or a field that is no file is too long.
    """
    form = _Form(_boundary(content_type), writer, field)
    block = bytearray()
    async for piece in body:
        block += piece
        if len(block) >= BLOCK_BYTES:
            await finish_in_thread(form.feed, bytes(block))
            block.clear()
    await finish_in_thread(form.feed, bytes(block))
    return form.end()


def _boundary(content_type: str) -> bytes:
    _, options = parse_options_header(content_type)
    if not options.get(b"boundary"):
        raise HTTPException(400, "the header Content-Type names no boundary: let your HTTP client write it")
    return options[b"boundary"]


class _Form:
    """What the parser of the form calls, and where its parts go."""

    def __init__(self, boundary: bytes, writer: UploadWriter, field: str) -> None:
        self._writer = writer
        self._file_field = field
        self._fields: dict[str, str] = {}
        self._num_files = self._num_fields = 0
        self._header = self._value = b""
        self._disposition = b""
        self._name = ""
        self._field: bytearray | None = None
        self._is_file = self._is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._end_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise HTTPException(400, BROKEN) from error

    def feed(self, block: bytes) -> None:
        """Take the next piece. Blocks."""
        try:
            self._parser.write(block)
        except FormParserError as error:
            raise HTTPException(400, BROKEN) from error

    def end(self) -> dict[str, str]:
        """Check that the form is whole, and give its fields."""
        if not self._is_complete:
            raise HTTPException(400, "the form ends before its last boundary: send it again")
        return self._fields

    def _begin_part(self) -> None:
        self._disposition = b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise HTTPException(400, BROKEN)
        self._name = options[b"name"].decode(errors="replace")
        self._is_file = self._name == self._file_field and b"filename" in options
        self._field = None
        if self._is_file:
            self._begin_file(options[b"filename"])
        elif b"filename" not in options:
            self._num_fields += 1
            if self._num_fields > MAX_FIELDS:
                raise TooLarge(f"The form has more than {MAX_FIELDS} fields.")
            self._field = bytearray()

    def _begin_file(self, filename: bytes) -> None:
        self._num_files += 1
        if self._num_files > MAX_FILES:
            raise TooLarge(f"The form has more than {MAX_FILES} files: send the rest in another.", param=self._name)
        try:
            self._writer.begin_file(filename.decode() or "unnamed")
        except UnicodeDecodeError:
            name = filename.decode(errors="replace")
            self._writer.begin_file(name, error=f"{name}: the file's name is not valid UTF-8: rename it")

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._writer.write(data[start:end])
        elif self._field is not None:
            self._field += data[start:end]
            if len(self._field) > MAX_FIELD_BYTES:
                raise TooLarge(f"{self._name}: is over {MAX_FIELD_BYTES} bytes.", param=self._name)

    def _end_part(self) -> None:
        if self._is_file:
            self._writer.end_file()
        elif self._field is not None:
            self._fields[self._name] = self._field.decode(errors="replace")

    def _end(self) -> None:
        self._is_complete = True
