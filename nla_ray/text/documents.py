"""Reads a user's texts: JSONL, Parquet, text files, folders of these, or a Hugging Face dataset.

Yields one document or one reject for every row, in the order of the source, and holds one batch at
a time. Protects two rules. A bad row never stops a read: it becomes a Reject with its line and its
reason. A file is read as what it is or named in a ValueError: never rows as if they were prose.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_ray.base.conversation import as_messages, join_turns
from nla_ray.run.identity import text_hash
from nla_ray.run.log import get_logger
from nla_ray.settings.config import CorpusConfig, require
from nla_ray.text.fields import MESSAGES_FIELD, BadRow, text_of_field, turns_of_field
from nla_ray.text.rejects import Reject

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_DOMAIN = "text"
BATCH_ROWS = 1_024
MAX_ID_CHARS, MAX_DOMAIN_CHARS = 1_000, 100
MAX_BYTES_PER_CHAR = 6
"""The longest JSON escape of a character. A longer line is over the limit before it is parsed."""
JSON_LINE_SLACK_BYTES = 1 << 20
"""Room for the other fields of a line."""
_ARRAY_OF_ROWS = re.compile(rb"\s*\[\s*\{")
_ROW = re.compile(rb'\{[ \t]*"')
_HEAD_BYTES = 1 << 16
"""Of a file: by them its format is told."""
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_OTHER_TABLES = {
    *(".csv", ".tsv", ".arrow", ".feather", ".orc", ".xlsx", ".sqlite", ".db", ".pkl"),
    *(".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".7z"),
}
"""Endings of files that hold texts in a form that is not read here."""
_COMPANION = re.compile(
    r"(readme|licen[cs]e|notice|citation|changelog|dataset_infos)\b.*"
    r"|.*\.(py|json|ya?ml|cff|bib|png|jpe?g|svg|gif|pdf)",
    re.IGNORECASE,
)
"""Names of files that come with data files and say something about them."""

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of the user's.

    Example:
        Document(doc_id="letters/17.txt", domain="text", text="Dear Anna, ...")
    """

    doc_id: str
    domain: str
    text: str
    group: str | None = None
    """The family that the user says it is of."""
    messages: str | None = None
    """Of a conversation its turns, as `as_messages` writes them; `text` is what they make."""


_Reader = Callable[[Path, str, CorpusConfig], Iterator[Document | Reject]]
"""Of a file, under the name that its rejects carry."""


def read_documents(config: CorpusConfig) -> Iterator[Document | Reject]:
    """Every row of `config.path` as a document or a reject.

    A row holds a text or, in MESSAGES_FIELD, a conversation. Rows may carry `doc_id`, `domain` and
    the field that `corpus.group_field` names. Without a doc_id the document is named after the hash
    of its text, so that its split does not depend on its line in the file. A row with an earlier
    row's doc_id becomes a reject.
    """
    require(
        config.path is not None,
        "corpus.path",
        config.path,
        "a file or a folder",
        "Set --corpus.path.",
    )
    path = Path(str(config.path)).expanduser()
    require(
        path.exists(),
        "corpus.path",
        str(path),
        "a file or a folder that exists",
        "Correct --corpus.path.",
    )
    seen: set[bytes] = set()
    for item in _rows_of(path, config):
        if isinstance(item, Document):
            key = bytes.fromhex(text_hash(item.doc_id)[:24])
            if key in seen:
                item = Reject(
                    source=path.name, line=0, reason=f"repeated doc_id {item.doc_id}"[:200]
                )
            seen.add(key)
        yield item


def require_json_lines(path: Path, setting: str) -> None:
    """Raises ValueError for a file in UTF-16, and for one that is a JSON array.

    `setting`: the one that names the file.
    """
    _require_utf8(path, setting)
    _require_no_array(path, _head_of(path), setting)


# Files and folders --------------------------------------------------------------------------------


def _rows_of(path: Path, config: CorpusConfig) -> Iterator[Document | Reject]:
    if path.is_dir():
        is_dataset = any(
            (path / name).exists()
            for name in ("dataset_info.json", "dataset_dict.json", "state.json")
        )
        return _read_dataset(path, config) if is_dataset else _read_folder(path, config)
    suffix = path.suffix.lower()
    require(
        suffix in {*_ROW_READERS, ".txt"},
        "corpus.path",
        str(path),
        "a .jsonl, .parquet or .txt file, or a folder",
        "Convert the file, or name it by its format.",
    )
    if suffix in _ROW_READERS:
        return _ROW_READERS[suffix](path, path.name, config)
    _require_utf8(path, "corpus.path")
    return _read_text_file(path, path.name, config)


def _read_folder(path: Path, config: CorpusConfig) -> Iterator[Document | Reject]:
    """The rows of the data files below the folder; where there is none, every file as a document.

    A data file is JSON Lines or Parquet; a card, a licence or a script beside it is no text of the
    corpus. Names are paths relative to the folder; hidden files are left out. Raises ValueError for
    a folder that mixes data files and texts, and for one whose data files are of another format.
    """
    names: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in relative.parts):
            names[relative.as_posix()] = file
    tables = [name for name, file in names.items() if _holds_rows(file, config)]
    unread = {name for name, file in names.items() if file.suffix.lower() in _OTHER_TABLES}
    texts = [
        name
        for name in sorted({*names} - {*tables} - unread)
        if not _COMPANION.fullmatch(Path(name).name)
    ]
    require(
        not (tables and texts),
        f"corpus.path {path}",
        f"data files ({tables[:1]} ...) and texts ({texts[:1]} ...)",
        "one of the two in a folder",
        "Name the data file itself, or give either a folder of its own.",
    )
    require(
        bool(tables or texts or not unread),
        f"corpus.path {path}",
        min(unread, default=None),
        "data files in JSON Lines or Parquet",
        "Convert them.",
    )
    if tables:
        others = len(names) - len(tables)
        logger.info("corpus: the rows of %d files; %d other files not read", len(tables), others)
        for name in tables:
            yield from _ROW_READERS[names[name].suffix.lower()](names[name], name, config)
        return
    for name, file in names.items():
        if name in unread:
            yield Reject(source=name, line=0, reason=f"{file.suffix.lower()} is not read")
        else:
            yield from _read_text_file(file, name, config)


def _holds_rows(file: Path, config: CorpusConfig) -> bool:
    """Whether a file of a folder is a data file; of `.json` files only those that hold texts are.

    Raises ValueError for a `.json` file that holds texts as an array.
    """
    suffix = file.suffix.lower()
    if suffix != ".json":
        return suffix in _ROW_READERS
    try:
        head = _head_of(file)
    except OSError:
        return False  # rejected as a text, with its reason
    fields = (config.text_field, MESSAGES_FIELD)
    if not any(json.dumps(name).encode() in head for name in fields):
        return False
    _require_no_array(file, head, "corpus.path")
    return _ROW.match(head) is not None


def _head_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_HEAD_BYTES).removeprefix(codecs.BOM_UTF8)


def _require_utf8(path: Path, setting: str) -> None:
    encoding = _wide_encoding(_head_of(path))
    require(
        encoding is None,
        f"{setting} {path}",
        encoding,
        "UTF-8",
        f"Convert it: iconv -f {encoding} -t UTF-8 '{path.name}' > 'utf8_{path.name}'",
    )


def _wide_encoding(head: bytes) -> str | None:
    """The encoding that a file's first bytes name, if it is not UTF-8."""
    return next((name for mark, name in _WIDE_ENCODINGS.items() if head.startswith(mark)), None)


def _require_no_array(path: Path, head: bytes, setting: str) -> None:
    require(
        _ARRAY_OF_ROWS.match(head) is None,
        f"{setting} {path}",
        "one JSON array",
        "JSON Lines: one object a line",
        "Convert it: python -c 'import json, sys; [print(json.dumps(row)) for row in"
        f" json.load(sys.stdin)]' < '{path.name}' > '{path.stem}_rows.jsonl'",
    )


# Formats ------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, name: str, config: CorpusConfig) -> Iterator[Document | Reject]:
    """Raises ValueError for a file in UTF-16, and for one that is a JSON array."""
    require_json_lines(path, "corpus.path")
    limit = MAX_BYTES_PER_CHAR * config.max_document_chars + JSON_LINE_SLACK_BYTES
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(limit):
            number += 1
            whole = raw.endswith(b"\n") or len(raw) < limit
            while not whole:  # skip the rest of the line without holding it
                rest = file.readline(limit)
                whole = not rest or rest.endswith(b"\n")
                raw = b""
            try:
                if not raw:
                    raise BadRow("over the length limit")
                yield _document(_parse_line(raw), config)
            except BadRow as bad:
                yield Reject(source=name, line=number, reason=str(bad))


def _parse_line(raw: bytes) -> dict[str, Any]:
    raw = raw.removeprefix(codecs.BOM_UTF8)  # of the file, or of a file that was appended to it
    if not raw.strip():
        raise BadRow("empty")
    if b"\0" in raw:
        raise BadRow("NUL bytes")
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        raise BadRow("truncated or invalid JSON") from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object")
    return row


def _document(row: dict[str, Any], config: CorpusConfig, doc_id: str | None = None) -> Document:
    """The row's document, of this id if one is given; raises BadRow with the reason.

    It is a conversation where the text's field holds a list of messages, or is not there while
    MESSAGES_FIELD is.
    """
    value, turns = row.get(config.text_field), None
    if value is None:
        if row.get(MESSAGES_FIELD) is None:
            raise BadRow("missing field")
        turns = turns_of_field(row[MESSAGES_FIELD], config.max_document_chars)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        turns = turns_of_field(value, config.max_document_chars)
    if turns is None:
        text, messages = text_of_field(value, config.max_document_chars), None
    else:
        text, messages = join_turns(turns), as_messages(turns)
    name = doc_id if doc_id is not None else row.get("doc_id")
    domain, group = row.get("domain"), row.get(config.group_field)
    has_group = group not in (None, "") and group == group  # NaN stands for none in some tables
    if name is None:
        name = f"{DEFAULT_DOMAIN}/{text_hash(text)[:32]}"
    return Document(
        doc_id=text_of_field(str(name), MAX_ID_CHARS),
        domain=text_of_field(str(domain), MAX_DOMAIN_CHARS) if domain else DEFAULT_DOMAIN,
        text=text,
        group=text_of_field(str(group), MAX_ID_CHARS) if has_group else None,
        messages=messages,
    )


def _read_parquet(path: Path, name: str, config: CorpusConfig) -> Iterator[Document | Reject]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"corpus.path {path}: got a file that Parquet cannot open ({error}), expected a whole"
            " Parquet file. Write it again."
        ) from None
    columns = _wanted_columns(file.schema_arrow.names, path, config)
    number = 0
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        yield from _read_table(pa.Table.from_batches([batch]), name, number, config)
        number += batch.num_rows


def _wanted_columns(names: list[str], path: Path, config: CorpusConfig) -> list[str]:
    require(
        config.text_field in names or MESSAGES_FIELD in names,
        f"corpus.text_field in {path}",
        config.text_field,
        f"one of its columns {', '.join(names)}",
        "Set --corpus.text-field.",
    )
    wanted = (config.text_field, MESSAGES_FIELD, "doc_id", "domain", config.group_field)
    return [name for name in dict.fromkeys(wanted) if name in names]


def _read_table(
    table: Any, source: str, start: int, config: CorpusConfig
) -> Iterator[Document | Reject]:
    """Rows of an Arrow table; `start`: rows of the source before it.

    Strings are taken as bytes first: Arrow does not promise that they are UTF-8.
    """

    columns = {}
    for name in table.column_names:
        column = table.column(name)
        kind = _with_bytes(column.type)
        columns[name] = (column if kind == column.type else column.cast(kind)).to_pylist()
    for index in range(table.num_rows):
        row = {name: values[index] for name, values in columns.items()}
        try:
            for name, value in row.items():
                if isinstance(value, bytes) and name not in (config.text_field, MESSAGES_FIELD):
                    row[name] = text_of_field(value, MAX_ID_CHARS) if value else None
            yield _document(row, config)
        except BadRow as bad:
            yield Reject(source=source, line=start + index + 1, reason=str(bad))


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """An Arrow type with bytes in place of strings, also in messages: lists of structures."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = _with_bytes(kind.value_type)
        return pa.list_(values) if pa.types.is_list(kind) else pa.large_list(values)
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([(field.name, _with_bytes(field.type)) for field in fields])
    return kind


def _read_dataset(path: Path, config: CorpusConfig) -> Iterator[Document | Reject]:
    from datasets import Dataset, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"corpus.path {path}: got a dataset that cannot be loaded ({error}), expected a folder"
            " written by save_to_disk. Save it again."
        ) from None
    if isinstance(loaded, Dataset):
        parts = {path.name: loaded}
    else:
        parts = {f"{path.name}/{name}": part for name, part in loaded.items()}
    for source, part in parts.items():
        columns = _wanted_columns(part.column_names, path, config)
        number = 0
        table: Any
        for table in part.select_columns(columns).with_format("arrow").iter(batch_size=BATCH_ROWS):
            yield from _read_table(table, source, number, config)
            number += table.num_rows


def _read_text_file(path: Path, name: str, config: CorpusConfig) -> Iterator[Document | Reject]:
    """The whole file as a document of this name."""
    try:
        if path.stat().st_size > MAX_BYTES_PER_CHAR * config.max_document_chars:
            raise BadRow("over the length limit")
        content = path.read_bytes()
        if encoding := _wide_encoding(content[:4]):
            raise BadRow(f"{encoding}, not UTF-8")
        yield _document({config.text_field: content}, config, doc_id=name)
    except BadRow as bad:
        yield Reject(source=name, line=0, reason=str(bad))
    except OSError as error:
        yield Reject(source=name, line=0, reason=f"cannot be read: {error.strerror}")


_ROW_READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
}
"""By a file's ending, in lower case."""
