"""Rows of a data file: .jsonl, .json, .csv or .parquet, with one line about what is wrong with it."""

import csv
import json

csv.field_size_limit(2**31 - 1)  # a field may be longer than 131,072 characters
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


def only_file(folder, split):
    """The one file of a split in a folder; raises ValueError."""
    found = sorted(f for f in folder.iterdir() if f.stem == split and f.suffix in FILE_TYPES)
    if len(found) != 1:
        names = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{folder} needs exactly one {split} file ({', '.join(split + t for t in FILE_TYPES)}); it holds {names}"
        )
    return found[0]


def read_rows(path):
    """[(where, row)] of a file; where names the row in messages. Raises ValueError."""
    rows = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = [
                (f"{path} row {i}", row)
                for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
            ]
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as f:
                reader = csv.DictReader(f, strict=True)
                try:
                    for row in reader:
                        if None in row or None in row.values():
                            fields = f"does not have the header's {len(reader.fieldnames)} fields"
                            raise ValueError(f"line {reader.line_num} {fields}")
                        rows.append((f"{path} line {reader.line_num}", row))
                except csv.Error as error:
                    raise ValueError(f"after line {reader.line_num}: {error}") from None
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(content, list):
                raise ValueError("the file is not a list of objects")
            rows = [(f"{path} item {i}", row) for i, row in enumerate(content, 1)]
        elif path.suffix == ".jsonl":
            for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
                if line.strip():
                    try:
                        rows.append((f"{path} line {i}", json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise ValueError(f"line {i}: {error.msg} at column {error.colno}") from None
        else:
            raise ValueError(f"unknown file type {path.suffix!r}, use {', '.join(FILE_TYPES)}")
    except ValueError as error:  # pyarrow's and json's errors are ValueErrors too
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not rows:
        raise ValueError(f"{path} is empty: it needs one problem a row")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object with named columns")
    return rows
