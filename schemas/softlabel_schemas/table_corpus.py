"""Corpora as a table and audio files: tab-separated (``.tsv``, no quoting) or comma-separated (``.csv``), with a header line.

Columns by name: ``utterance_id`` and ``audio`` (a path relative to the table's folder, or a URL) are needed; ``text``,
``speaker``, ``split``, ``start`` and ``duration`` (seconds, of a part of a recording) and ``alignment`` (the class id of each
frame, with spaces between) are used where they are there; others are passed over.
"""

from __future__ import annotations

import csv
import io

from softlabel_schemas.corpus import split_url
from softlabel_schemas.errors import InputError
from softlabel_schemas.frame_labels import class_ids_of
from softlabel_schemas.imported import ImportedRow, read_text
from softlabel_schemas.problems import Problems
from softlabel_schemas.strict import printable

_NEEDED = ("utterance_id", "audio")
# Of a value: an alignment of a day of 10 ms frames, with six digits and a space for each, has 60 million. csv's own limit,
# 131,072, is three minutes of such.
_MAX_CHARACTERS = 64 << 20


def read_table(url: str) -> list[ImportedRow]:
    """The rows of a table, in order.

    Raises:
        InputError: not such a table, or rows with values that are missing or are no numbers; all of them, by what is wrong.
    """
    folder, _ = split_url(url)
    if not url.endswith((".tsv", ".csv")):
        raise InputError(f"{url} is neither .tsv (tab-separated) nor .csv (comma-separated)")
    text = io.StringIO(read_text(url), newline="")
    is_tsv = url.endswith(".tsv")
    table = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE) if is_tsv else csv.DictReader(text)
    # It is one for the whole process.
    limit = csv.field_size_limit(_MAX_CHARACTERS)
    try:
        return _rows(table, url, folder, is_tsv=is_tsv)
    except csv.Error as error:
        raise InputError(f"{url}, line {table.line_num + 1}: not a row of a table: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _rows(table: csv.DictReader[str], url: str, folder: str, *, is_tsv: bool) -> list[ImportedRow]:
    missing = [name for name in _NEEDED if name not in (table.fieldnames or ())]
    if missing:
        # Without a header line they are values, and a URL among them may hold a credential.
        found = ", ".join("a URL" if "://" in name else printable(name) for name in table.fieldnames or ())
        raise InputError(
            f"{url} has no column {' and no column '.join(missing)} (it has {found}); name them in its first line, with "
            f"{'tabs' if is_tsv else 'commas'} between"
        )
    problems, rows = Problems(), []
    for fields in table:
        where = f"line {table.line_num}"
        # What a row has beyond the header is under None, what it lacks is None.
        if None in fields or None in fields.values():
            problems.add(f"rows that have not {len(table.fieldnames or ())} values", where)
            continue
        empty = [name for name in _NEEDED if not fields[name]]
        for name in empty:
            problems.add(f"rows without {name}", where)
        if not empty:
            try:
                rows.append(_row(fields, folder))
            except (ValueError, OverflowError):
                problems.add("rows with a start, duration or alignment that is no number", fields["utterance_id"])
    problems.raise_if_any(f"{url} cannot be imported")
    return rows


def _row(fields: dict[str, str], folder: str) -> ImportedRow:
    audio, ids = fields["audio"], fields.get("alignment")
    return ImportedRow(
        utterance_id=fields["utterance_id"],
        audio=audio if "://" in audio or audio.startswith("/") else f"{folder}/{audio}",
        start=float(fields.get("start") or 0.0),
        duration=float(fields["duration"]) if fields.get("duration") else None,
        text=fields.get("text") or None,
        speaker=fields.get("speaker") or None,
        split=fields.get("split") or None,
        class_ids=class_ids_of([int(each) for each in ids.split()]) if ids else None,
    )
