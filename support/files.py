"""Where rows come from: data files, folders of them, the hub. What is wrong with one of them is one line."""

import csv
import json
import os
import pickle
import re
import tempfile
from array import array

csv.field_size_limit(2**31 - 1)  # a field may be longer than 131,072 characters
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
TEST = ("test", "validation", "valid", "val", "dev", "eval")  # to evaluate on: the first that is there
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?::([\w.-]+))?")


class Spool:
    """A sequence of records in a temporary file that ends with the process: 8 bytes of memory each."""

    def __init__(self, records):
        self.file, self.ends = tempfile.TemporaryFile(), array("q", [0])
        for record in records:
            self.ends.append(self.ends[-1] + self.file.write(pickle.dumps(record)))
        self.file.flush()

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        start, end = self.ends[i], self.ends[i + 1]
        return pickle.loads(os.pread(self.file.fileno(), end - start, start))


# Rows are (where, row): where names the row in messages. A set is [training rows, test rows], or [all rows].


def folder_rows(folder, eval_only):
    """The rows of a folder's train.* and test.* file, which may be in parts, as train-00000-of-00002.parquet."""
    files = {}
    for path in sorted(f for f in folder.iterdir() if f.suffix in FILE_TYPES):
        files.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    names = _chosen(files, eval_only) or ["test"]
    if not eval_only and len(names) < 2:
        names = ["train", "test"]
    for name in names:
        parts = files.get(name, [])
        if len(parts) != 1 and not (parts and all("-of-" in part.stem for part in parts)):
            types = ", ".join(name + suffix for suffix in FILE_TYPES)
            held = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
            hint = "; --eval_only needs a test file alone" if name == "train" and not parts else ""
            raise ValueError(f"{folder} needs exactly one {name} file ({types}); it holds {held}{hint}")
    return [(row for path in files[name] for row in read_rows(path)) for name in names]


def hub_rows(dataset, eval_only):
    """The rows of OWNER/NAME[/CONFIG][:SPLIT]. Without CONFIG: the only one, the default one, or main."""
    import datasets  # only the hub needs it

    name, config, split = HUB_NAME.fullmatch(dataset).groups()
    try:
        try:
            splits = datasets.load_dataset(name, config)
        except ValueError as error:
            if config or "'main'" not in str(error):  # it says that one has to be named, and lists them
                raise
            splits = datasets.load_dataset(name, "main")
    except Exception as error:  # no such set, no network, no access, ..: each has a type of its own
        what = f"--dataset {dataset}: no such file or folder, nor OWNER/NAME[/CONFIG][:SPLIT] on the hub"
        raise ValueError(f"{what}: {' '.join(str(error).split()):.400}") from None
    names = [split] if split else _chosen(splits, eval_only)
    if not names or split and split not in splits:
        what = f"--dataset {dataset} has the splits {', '.join(splits)}"
        raise ValueError(f"{what}: name the one to train and to test on, as in {name}:{next(iter(splits))}")
    return [_numbered(f"{name} {split}", splits[split]) for split in names]


def _numbered(where, rows):
    if not len(rows):
        raise ValueError(f"{where} is empty")
    for i, row in enumerate(rows, 1):
        yield f"{where} row {i}", _row(row)


def _chosen(splits, eval_only):
    """Names of the splits to train and to test on, or of the one for both; [] if none is."""
    test = next((name for name in TEST if name in splits), None)
    if "train" in splits:
        return ["train", test] if test else ["train"]
    return [test] if test and eval_only else [] if test else list(splits) if len(splits) == 1 else []


def read_rows(path):
    """Yields the rows of a file. Raises ValueError."""
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}.get(path.suffix)
    where = None
    try:
        if not read:
            raise ValueError(f"unknown file type {path.suffix!r}, use {', '.join(FILE_TYPES)}")
        for place, row in read(path):
            where = f"{path} {place}"
            yield where, _row(row)
    except (ValueError, OSError) as error:  # those of json, csv and pyarrow are among them
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if where is None:
        raise ValueError(f"{path} is empty: it needs one problem a row")


def _jsonl(path):
    with open(path, encoding="utf-8-sig", newline="\n") as lines:  # other line ends may stand in a text
        for i, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {i}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {i}: {error.msg} at column {error.colno}") from None


def _json(path):
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, list):
        raise ValueError("the file is not a list of objects")
    for i, row in enumerate(content, 1):
        yield f"item {i}", row


def _csv(path):
    csv.field_size_limit(1 << 30)  # characters; 131,072 without it
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    fields = f"does not have the header's {len(reader.fieldnames)} fields"
                    raise ValueError(f"line {reader.line_num} {fields}")
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"after line {reader.line_num}: {error}") from None


def _parquet(path):
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    maps = dict(maps_as_pydicts="strict") if "map<" in str(file.schema_arrow) else {}  # three times slower
    batches = file.iter_batches(batch_size=1000)
    for i, row in enumerate((row for batch in batches for row in batch.to_pylist(**maps)), 1):
        yield f"row {i}", row


def _row(row):
    """A row that is a list is a conversation; the package datasets makes columns 0, 1, .. of one."""
    if isinstance(row, dict) and "0" in row:
        row = list(row.values())
    conversation = isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row)
    return {"conversations": row} if conversation else row
