"""What a file of text holds by its first bytes, and what to do where it is nothing to train on."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

from trainer.errors import UserError

_HEAD_BYTES = 1 << 16
_OBJECT = re.compile(rb'\{\s*"[^"\n]{0,200}"\s*:')
_ARRAY = re.compile(rb'\[\s*[{"]')

# First bytes of formats that come by mistake, and the command that makes a text file of them.
_PACKED = {
    b"\x1f\x8b": ("packed by gzip", "gunzip -c"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "zstd -dc"),
    b"BZh": ("packed by bzip2", "bunzip2 -c"),
    b"\xfd7zXZ\x00": ("packed by xz", "xz -dc"),
    b"PK\x03\x04": ("a zip archive", "unzip -p"),
}
_TABLES = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"Obj\x01": "Avro", b"SQLite format 3": "SQLite", b"%PDF": "PDF"}

# UTF-32 first: in little-endian order its mark begins with that of UTF-16.
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def require_lines(path: Path) -> None:
    """Check the beginning of a file whose lines should be JSON objects.

    Raises:
        UserError: it is packed, binary, in another encoding, one JSON value over many lines, or plain text.
        OSError: the file cannot be read.
    """
    head = _head(path)
    _require_utf8_text(path, head)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    lines = quoted(path, ".jsonl")
    if _ARRAY.match(body):
        raise UserError(
            f"{path}: a JSON array, and not one JSON object in each line. Convert it: "
            f"jq -c '.[]' {quoted(path)} > {lines}"
        )
    first = body.partition(b"\n")[0].strip()
    if first == b"{" or (first.startswith(b"{") and not _is_json(first) and _is_json(body)):
        raise UserError(
            f"{path}: one JSON object over several lines, and not one in each line. Convert it: "
            f"jq -c . {quoted(path)} > {lines}"
        )


def require_prose(path: Path) -> None:
    """Check the beginning of a ``.txt`` file, which is one document of plain text.

    Raises:
        UserError: it begins as JSON, or it is packed, binary or in another encoding.
        OSError: the file cannot be read.
    """
    head = _head(path)
    _require_utf8_text(path, head)
    body = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _OBJECT.match(body):
        raise UserError(
            f"{path}: its first line is a JSON object, but a .txt file is one document of plain text. Rename it to "
            f"{path.with_suffix('.jsonl').name}, so that each line is a document."
        )
    if _ARRAY.match(body):
        raise UserError(
            f"{path}: a JSON array, but a .txt file is one document of plain text. Convert it: "
            f"jq -c '.[]' {quoted(path)} > {quoted(path, '.jsonl')}"
        )


def other_endings(folder: Path) -> str:
    """A sentence about the files of a folder that has no JSONL file. Empty if it holds no file at all."""
    names = Counter("".join(path.suffixes[-2:]) or path.name for path in folder.rglob("*") if path.is_file())
    if not names:
        return ""
    shown = ", ".join(f"{count} × {ending}" for ending, count in names.most_common(4))
    return f" It holds {shown}{', …' if len(names) > 4 else ''}. Unpack or convert them, or name single files."


def conversion_of(line: bytes) -> str:
    """The beginning of the command that makes UTF-8 of bytes that are not. Empty if nothing is known of them."""
    encoding = encoding_of(line)
    if encoding == "UTF-16":
        return "iconv -f UTF-16 -t UTF-8"
    return "iconv -f CP1252 -t UTF-8" if encoding in {"Latin-1", "cp1252"} else ""


def encoding_of(line: bytes) -> str:
    """A guess at the encoding of bytes that are not UTF-8, in words."""
    if b"\x00" in line:
        return "UTF-16"
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return "an encoding of bytes"
    # The bytes from 0x80 to 0x9F are quotation marks and dashes in cp1252, and control characters in Latin-1.
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in line) else "Latin-1"


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _require_utf8_text(path: Path, head: bytes) -> None:
    for mark, (what, command) in _PACKED.items():
        if head.startswith(mark):
            ending = "" if path.with_suffix("").suffix else ".jsonl"
            raise UserError(f"{path}: {what}. Unpack it first: {command} {quoted(path)} > {quoted(path, ending)}")
    table = next((what for mark, what in _TABLES.items() if head.startswith(mark)), None)
    if table is None and b"\x00" in head and not head.startswith(tuple(_MARKS)) and not _looks_wide(head):
        table = "binary"
    if table:
        raise UserError(
            f'{path}: a {table} file, and not text. Write its texts as JSON lines first: {{"text": "…"}} in each line.'
        )
    if b"\x00" in head:
        order = "LE" if head[:1] != b"\x00" else "BE"
        wide = next((name for mark, name in _MARKS.items() if head.startswith(mark)), f"UTF-16{order}")
        raise UserError(
            f"{path}: in {wide}, and not in UTF-8. Convert it: "
            f"iconv -f {wide} -t UTF-8 {quoted(path)} > {quoted(path, f'.utf8{path.suffix}')}"
        )


def _looks_wide(head: bytes) -> bool:
    """Whether every second byte is mostly zero, as in UTF-16 of European text."""
    return max(head[0:2000:2].count(0), head[1:2000:2].count(0)) > len(head[:2000]) / 4


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def quoted(path: Path, ending: str | None = None) -> str:
    """The path for a shell, with another ending if one is given. It never names the same file then."""
    if ending is None:
        return shlex.quote(str(path))
    other = path.with_suffix(ending)
    return shlex.quote(str(other if other != path else path.with_suffix(f".lines{ending}")))
