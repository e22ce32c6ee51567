"""Problems and prompts: MATH and GSM8K from the hub, generated arithmetic, or your own file.

    train, test = load("gsm8k")
    prompts, skipped = encode(train, tokenizer, max_prompt=1024)

The paper's prompt is the default template.
"""

import csv
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

# All four models of the paper were tuned on this prompt (paper.md of the released configs); the response begins right after it.
PAPER_TEMPLATE = "[MATH_TASK] Problem:\n{problem}\n\nSolution:"
CHAT_TEMPLATES = {  # what a chat model is asked, inside its own chat markup
    "math": "{problem}\n\nReason step by step, and put your final answer within \\boxed{}.",
    "gsm8k": "{problem}\n\nReason step by step, one step per line, and end with a line '#### <number>'.",
    "arithmetic": "{problem}\n",
}
HUB = {"math": ("nlile/hendrycks-MATH-benchmark", None), "gsm8k": ("openai/gsm8k", "main")}
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Problem:
    prompt: str  # what the policy sees, template filled in; its response begins right after it
    answer: str  # the gold answer, bare: "72", "\\frac{1}{2}"
    solution: str = ""  # a worked solution where the dataset has one; only sft.py reads it


def load(dataset, template=None, chat=False):
    """Read a dataset.

    dataset: "math", "gsm8k", "arithmetic", or the path of a .jsonl/.json/.csv/.parquet file or of a folder that holds a train.*
    and a test.* file of these types. A single file is split: every tenth row is a test problem.
    template: prompt text with the placeholder {problem}; None takes the paper's (or, with chat, one that asks for the answer's form).
    Returns (train, test), two lists of Problem. Raises ValueError, one line that says what, where and what to do.
    """
    if template is not None and "{problem}" not in template:
        raise ValueError(f"--prompt_template {template!r} has no {{problem}} in it: put {{problem}} where the problem goes")
    path = Path(dataset)
    if dataset == "arithmetic":
        rows = arithmetic(20_000, 500)
    elif dataset in HUB:
        import datasets  # only the hub needs it

        splits = datasets.load_dataset(*HUB[dataset])
        rows = [[(f"{dataset} {split} row {i}", row) for i, row in enumerate(splits[split])] for split in ("train", "test")]
    elif path.is_dir():
        rows = [_read(_only_file(path, split)) for split in ("train", "test")]
    elif path.is_file():
        numbered = _read(path)
        if len(numbered) < 2:
            raise ValueError(f"{path} has one row: a single file needs at least two, one to train on and one to test on")
        held_out = range(9, len(numbered), 10) if len(numbered) >= 10 else [len(numbered) - 1]
        rows = [[row for i, row in enumerate(numbered) if i not in held_out], [numbered[i] for i in held_out]]
    elif path.suffix in FILE_TYPES or len(path.parts) > 1:
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    else:
        raise ValueError(
            f"--dataset {dataset} is not known: use math, gsm8k, arithmetic, or the path of a {'/'.join(FILE_TYPES)} file or folder"
        )
    train, test = ([_problem(where, row) for where, row in split] for split in rows)
    if template is None and chat:
        boxed = "\\boxed" in train[0].solution or dataset == "math"
        template = CHAT_TEMPLATES[dataset if dataset == "arithmetic" else "math" if boxed else "gsm8k"]
    elif template is None:
        template = "{problem}\n" if dataset == "arithmetic" else PAPER_TEMPLATE
    return tuple([Problem(template.replace("{problem}", p.prompt), p.answer, p.solution) for p in split] for split in (train, test))


def encode(problems, tokenizer, max_prompt, chat=False):
    """Token ids of the prompts, by the tokenizer's own rule for BOS, or inside its chat template.

    Returns (kept, skipped): kept is a list of (Problem, ids), skipped counts the problems whose prompt is longer than max_prompt.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {tokenizer.name_or_path} has no chat template")
    if chat:
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p.prompt}], add_generation_prompt=True, tokenize=False)
            for p in problems
        ]
    else:
        texts = [p.prompt for p in problems]
    ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a chat template writes its own BOS
    kept = [(p, i) for p, i in zip(problems, ids) if len(i) <= max_prompt]
    return kept, len(problems) - len(kept)


def _only_file(folder, split):
    found = sorted(f for f in folder.iterdir() if f.stem == split and f.suffix in FILE_TYPES)
    if len(found) != 1:
        names = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
        raise ValueError(f"{folder} needs exactly one {split} file ({', '.join(split + t for t in FILE_TYPES)}); it holds {names}")
    return found[0]


def _read(path):
    """[(where, row)] of a file; where names the row in error messages."""
    rows = []
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = [(f"{path} row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]
        elif path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8") as f:
                reader = csv.DictReader(f, strict=True)
                for row in reader:
                    if None in row or None in row.values():
                        raise ValueError(f"line {reader.line_num} does not have the header's {len(reader.fieldnames)} fields")
                    rows.append((f"{path} line {reader.line_num}", row))
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, list):
                raise ValueError("the file is not a list of objects")
            rows = [(f"{path} item {i}", row) for i, row in enumerate(content, 1)]
        elif path.suffix == ".jsonl":
            for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
                if line.strip():
                    try:
                        rows.append((f"{path} line {i}", json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise ValueError(f"line {i}: {error.msg} at column {error.colno}") from None
        else:
            raise ValueError(f"unknown file type {path.suffix!r}, use {', '.join(FILE_TYPES)}")
    except (ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors too
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not rows:
        raise ValueError(f"{path} is empty: it needs one problem a row")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object with named columns")
    return rows


def _problem(where, row):
    """Problem of one row; its prompt is still the bare problem text."""
    text = row.get("problem") or row.get("question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no problem: needs a column problem or question, found {', '.join(map(str, row)) or 'none'}")
    if "answer" not in row and "solution" not in row:
        raise ValueError(f"{where}: needs a column answer or solution, found {', '.join(map(str, row))}")
    answer = str(row["answer"]).strip() if row.get("answer") is not None else ""
    solution = row.get("solution") or ""
    if not isinstance(solution, str):
        raise ValueError(f"{where}: its solution is no text but {type(solution).__name__}")
    if "####" in answer or "\\boxed" in answer:  # GSM8K's answer column is a solution
        solution, answer = answer, ""
    answer = answer or _gold(solution)
    if not answer:
        raise ValueError(f"{where} has no gold answer: fill answer, or end the solution in \\boxed{{..}} or '#### n'")
    return Problem(text, answer, re.sub(r"<<[^<>\n]*>>", "", solution))  # GSM8K's calculator marks


def _gold(solution):
    """The answer at the end of a well-formed solution, "" where there is none (grader.extract_answer is the one for sampled text)."""
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip()
    start, depth = solution.rfind("\\boxed{"), 0
    for i in range(start + len("\\boxed"), len(solution) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[start + len("\\boxed{") : i].strip()
    return ""


# --- arithmetic: chains of 5-9 operations on numbers below 100, worked from left to right -------------------------------------------


def arithmetic(num_train, num_test, seed=0, slip=(0.15, 0.15, 0.55)):
    """Rows of the built-in task, train and test disjoint: problem "8*9+6-7+5+1?", solution one line per operation and "#### 77".

    The solutions are a careless demonstrator's: on a carry in an addition, a borrow in a subtraction and a two-digit product with a
    carry he forgets it with the probabilities slip, and goes on from the wrong number. The answer column is always the true one, so
    a policy tuned on the solutions fails at particular steps; this is where the headroom for RL comes from.
    """
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < num_train + num_test:
        value, chain = rng.randint(1, 9), []
        expression = str(value)
        for _ in range(rng.randint(5, 9)):
            moves = [(op, d) for op in "+-*" for d in range(2 if op == "*" else 1, 10) if 0 <= _apply(value, op, d) < 100]
            op = rng.choice(sorted({op for op, _ in moves}))
            digit = rng.choice([d for o, d in moves if o == op])
            value = _apply(value, op, digit)
            chain.append((op, digit))
            expression += f"{op}{digit}"
        if expression not in seen:
            seen.add(expression)
            rows.append({"problem": expression + "?", "answer": str(value), "solution": _demonstrate(int(expression[0]), chain, slip, rng)})
    numbered = [(f"arithmetic problem {i}", row) for i, row in enumerate(rows)]
    return numbered[:num_train], numbered[num_train:]


def _apply(value, op, digit):
    return value + digit if op == "+" else value - digit if op == "-" else value * digit


def _demonstrate(value, chain, slip, rng):
    """The careless demonstrator's lines; he forgets the carry or the borrow of the ones with probability slip = (+, -, *)."""
    lines = []
    for op, digit in chain:
        result, ones = _apply(value, op, digit), value % 10
        if op == "+" and ones + digit >= 10 and rng.random() < slip[0]:
            result -= 10
        elif op == "-" and ones < digit and rng.random() < slip[1]:
            result += 10
        elif op == "*" and value >= 10 and ones * digit >= 10 and rng.random() < slip[2]:
            result -= ones * digit // 10 * 10
        lines.append(f"{value}{op}{digit}={result}")
        value = result
    return "\n".join([*lines, f"#### {value}"])
