"""One reader per file format: a path in, rows out. Floor 2.

JSON Lines is read on bytes and split at LF only: U+2028, U+0085 and the like are text, and a line with broken
UTF-8 costs that line alone. A CSV or Parquet file, or a JSON array, that breaks off is refused as a whole: what
follows the break cannot be told from what does not.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from strop.data.read.arrow import RowMaker
from strop.data.read.row import Row, RowRefused
from strop.errors import DataError
from strop.types import Origin

LONGEST = 1 << 28
"""Bytes of a line. A file that unpacks to one endless line is not read into memory."""

BOM = b"\xef\xbb\xbf"


class _DuplicateKey(Exception):  # noqa: N818 (caught where it is raised, two functions up)
    """A JSON object with one key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_ANY = json.JSONDecoder()


def decoded(line: bytes) -> str:
    """The text of a line.

    Raises:
        RowRefused: invalid_utf8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowRefused(
            "invalid_utf8",
            f"the bytes {line[error.start : error.end]!r} at byte {error.start} are not UTF-8",
            expected="UTF-8 text",
            fix="convert the file to UTF-8",
        ) from error


def parse_line(line: bytes) -> Mapping[str, Any]:
    """One line of JSON Lines as an object.

    Raises:
        RowRefused: invalid_utf8, invalid_json, truncated_json, deep_nesting, duplicate_key or not_an_object.
    """
    text = decoded(line)
    try:
        value = _DECODER.decode(text)
    except _DuplicateKey as error:
        raise _duplicate(error) from error
    except RecursionError as error:
        raise RowRefused("deep_nesting", "the row is nested too deeply to be read") from error
    except ValueError as error:
        raise _broken_json(text, error) from error
    return _as_object(value)


def _duplicate(error: _DuplicateKey) -> RowRefused:
    return RowRefused(
        "duplicate_key",
        f"an object has the key {str(error)[:80]!r} twice",
        expected="every key once; which of the two is meant cannot be known",
    )


def _broken_json(text: str, error: ValueError) -> RowRefused:
    expected = "one JSON object on one line"
    if not isinstance(error, json.JSONDecodeError):  # an integer of more than 4300 digits
        return RowRefused("invalid_json", f"the row is not JSON that can be read: {error}", expected=expected)
    column = f"column {error.pos + 1}"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return RowRefused("truncated_json", f"the JSON breaks off: {error.msg} ({column})", expected=expected)
    return RowRefused("invalid_json", f"the line is not JSON: {error.msg} ({column})", expected=expected)


def _as_object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        kind = "null" if value is None else type(value).__name__
        raise RowRefused("not_an_object", f"the row is a JSON {kind}", expected="a JSON object, {...}")
    return value


def read_jsonl(path: str) -> Iterator[Row]:
    """JSON Lines, gzip or not."""
    with _open(path) as file:
        yield from jsonl_rows(_lines(file), path)


def read_lines(path: str) -> Iterator[Row]:
    """JSON Lines, gzip or not, with lines that nobody has looked at yet: rows with `raw` alone."""
    with _open(path) as file:
        yield from jsonl_rows(_lines(file), path, parse=False)


def read_text(path: str) -> Iterator[Row]:
    """Plain text, gzip or not: each line that is not blank is a row {"text": line}."""
    with _open(path) as file:
        for row in jsonl_rows(_lines(file), path, parse=False):
            if row.raw is None:
                yield row
                continue
            try:
                yield Row(row.origin, {"text": decoded(row.raw)}, raw=row.raw)
            except RowRefused as refusal:
                yield Row(row.origin, refusal=refusal, raw=row.raw)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines, read no further than it takes to see that one is too long."""
    return iter(lambda: file.readline(LONGEST + 1), b"")


def jsonl_rows(lines: Iterable[bytes], label: str, *, parse: bool = True) -> Iterator[Row]:
    """The rows of lines, ended by LF; a blank line is a row with neither data nor refusal nor raw."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(BOM)
        if len(line) > LONGEST:
            raise DataError(
                f"a line of more than {LONGEST >> 20} MiB",
                where=f"{label}:{number}",
                expected="one JSON object on every line",
                fix="check that the file is JSON Lines, and what wrote it",
            )
        line = line.rstrip(b"\r\n")
        origin = Origin(label, number)
        if not line.strip():
            yield Row(origin)
            continue
        if not parse:
            yield Row(origin, raw=line)
            continue
        try:
            yield Row(origin, parse_line(line), raw=line)
        except RowRefused as refusal:
            yield Row(origin, refusal=refusal, raw=line)


def read_json(path: str) -> Iterator[Row]:
    """A JSON array of objects; a file that does not begin with `[` is read as JSON Lines."""
    with _open(path) as file:
        content = file.read().removeprefix(BOM)
    if not content.lstrip().startswith(b"["):
        _refuse_one_object(content, path)
        yield from jsonl_rows(io.BytesIO(content), path)
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8", where=f"{path}:{line}", expected="UTF-8 text", fix="convert the file to UTF-8"
        ) from error
    yield from _array_rows(text, path)


def _refuse_one_object(content: bytes, path: str) -> None:
    """One object over several lines is no JSON Lines, whose lines would be refused one by one, or be rows by chance."""
    first, end, _ = content.lstrip().partition(b"\n")
    try:
        if not end or isinstance(_ANY.decode(decoded(first)), dict):
            return
    except (ValueError, RecursionError):
        pass
    try:
        found = _ANY.decode(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return  # its lines say what is wrong
    if not isinstance(found, dict):
        return
    names = ", ".join(repr(str(name)[:40]) for name in list(found)[:8])
    raise DataError(
        "the file is one JSON object" + (f" with {names}" if names else ""),
        where=path,
        expected="a JSON array of objects, or JSON Lines: one object on every line",
        fix="write the list of rows that is in it to a file of its own",
    )


def _array_rows(text: str, path: str) -> Iterator[Row]:
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    first = True
    while True:
        start = _skip_space(text, position)
        if text[start : start + 1] == "]" and (first or text[position - 1] != ","):
            if text[start + 1 :].strip():
                raise _broken_array(path, text, start + 1, "something follows the end of the array")
            return
        line += text.count("\n", position, start)
        origin = Origin(path, line)
        data, refusal = None, None
        try:
            value, stop = _DECODER.raw_decode(text, start)
            data = _as_object(value)
        except _DuplicateKey as error:
            refusal, stop = _duplicate(error), _ANY.raw_decode(text, start)[1]
        except RowRefused as error:
            refusal = error
        except (ValueError, RecursionError) as error:
            raise _broken_array(path, text, start, str(error)) from error
        yield Row(origin, data, refusal, raw=text[start:stop].encode("utf-8", errors="surrogatepass"))
        position = _skip_space(text, stop)
        line += text.count("\n", start, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            raise _broken_array(path, text, position, "neither a comma nor the end of the array follows a row")
        first = False


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _broken_array(path: str, text: str, position: int, problem: str) -> DataError:
    return DataError(
        f"the JSON array is broken: {problem}",
        where=f"{path}:{text.count(chr(10), 0, position) + 1}",
        expected="a JSON array of objects, or JSON Lines",
        fix="fix the file; in JSON Lines (one object per line) a broken row costs that row alone",
    )


def read_csv(path: str) -> Iterator[Row]:
    """Comma-separated values with a header line; every value is text."""
    csv.field_size_limit(2**31 - 1)  # the default refuses fields above 128 KiB
    with _open(path) as binary:
        yield from _csv_rows(csv.reader(_text_lines(binary, path), strict=True), path)


def _text_lines(lines: Iterable[bytes], path: str) -> Iterator[str]:
    """Lines as text, with their ends: one at a time, so that a broken byte is found with its line."""
    for number, line in enumerate(lines, start=1):
        try:
            text = (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                "the file is not UTF-8", where=f"{path}:{number}", fix="convert the file to UTF-8"
            ) from error
        yield from re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)


def _csv_rows(reader: Any, path: str) -> Iterator[Row]:
    header: list[str] | None = None
    last = 0
    try:
        for values in reader:
            origin = Origin(path, last + 1)
            last = reader.line_num
            if header is None:
                header = values
                _refuse_doubles(header, f"{path}:{origin.line}", "a header line")
            elif not values:
                yield Row(origin)
            elif len(values) != len(header):
                refusal = RowRefused(
                    "wrong_columns", f"the row has {len(values)} values", expected=f"{len(header)}, as in the header"
                )
                yield Row(origin, refusal=refusal, raw=",".join(values).encode())
            else:
                yield Row(origin, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"the CSV file is broken: {error}",
            where=f"{path}:{last + 1}",
            expected="comma-separated values, quoted by double quotes",
        ) from error


def _refuse_doubles(names: list[str], where: str, what: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(
            f"two columns are named {twice!r}", where=where, expected=f"{what} in which every name stands once"
        )


def read_parquet(path: str) -> Iterator[Row]:
    """Parquet; the line of a row is its number, from 1."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _refuse_doubles(file.schema_arrow.names, path, "a table")
            maker = RowMaker(file.schema_arrow)
            # a name with a dot would be taken for a path, so columns are named only where some are left out
            columns = maker.columns if len(maker.columns) < len(maker.schema) else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for data in maker.rows(batch):
                    number += 1
                    yield Row(Origin(path, number), data)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # damage can look like anything
        raise DataError(
            f"the Parquet file cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
            where=f"{path}:{number + 1}",
            fix="write or download the file again",
        ) from error


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def file_kind(path: str) -> str | None:
    """The key of READERS that the name of a file asks for; None where it asks for none."""
    name = path.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    return kind if kind in READERS and not (kind == ".parquet" and name.endswith(".gz")) else None


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """The file as bytes, unpacked; what goes wrong while it is read becomes a DataError."""
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb") as file:
            yield cast(IO[bytes], file)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> DataError:
    """What to say of a file that cannot be read."""
    problem = getattr(error, "strerror", None) or str(error)
    fix = "check that the file is whole, readable for this user, and what its name says"
    return DataError(f"the file cannot be read: {problem}", where=path, fix=fix)
