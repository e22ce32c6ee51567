r"""What the columns of a row mean, as the field's data sets name and fill them.

fields_of({"question": "What is 1+2?", "answer": "1+2=3\n#### 3"})["answer"]  ->  "3"
"""

import ast
import json
import math
import re
from decimal import Decimal
from string import ascii_uppercase as LETTERS

from grading import boxed

# of each kind the first that holds something
PROBLEM = ("problem", "question", "query", "prompt", "messages", "conversations")
WHOLE = ("prompt", "messages", "conversations")  # all that the policy is to see
CHOICES = ("choices", "options")
ANSWER = "answer ground_truth reward_model.ground_truth final_answer expected_answer answerkey".split()
SOLUTION = ("solution", "completion", "generated_solution", "response")  # ends in the answer, or is it
ROLES = {"human": "user", "gpt": "assistant"}
ABSENT = object()


def fields_of(row, problem_column=None, answer_column=None, answered=True, from_hub=False):
    """The fields of a data.Problem that a row fills: text, prompt, turns, answer, solution. Raises ValueError.

    answered: it must have a column with its answer. from_hub: the package datasets has read it.
    """
    if not isinstance(row, dict):
        raise ValueError("it is not an object with named columns")
    columns = {str(name).lower(): value for name, value in row.items()}
    name, value = _find(columns, PROBLEM, problem_column)
    if name is None:
        raise ValueError(_missing(row, "problem", PROBLEM, problem_column))
    turns, last, text = _turns(value), {}, value
    if turns is not None:
        last = turns.pop() if turns and turns[-1]["role"] == "assistant" else {}
        text = turns.pop()["content"] if turns and turns[-1]["role"] == "user" else None
    if not all(isinstance(x, str) for x in [text, *(t["content"] for t in turns or [])]) or not text.strip():
        raise ValueError(f"its {name} is {value!r:.60}; it must be text, or messages that end with a user's")
    named, gold = _find(columns, ANSWER, answer_column)
    if "gold" in last and not answer_column:
        named, gold = "ground_truth", last["gold"]
    choices = _choices(_find(columns, CHOICES)[1])
    if not choices and set("abcd") <= set(columns) and re.fullmatch("[A-Da-d]", str(gold)):
        choices = [(letter.upper(), columns[letter]) for letter in "abcd"]  # a column each
    if choices:
        asked = "\n".join(f"{letter}. {choice}" for letter, (_, choice) in zip(LETTERS, choices))
        text = f"{text}\n\n{asked}\n\nAnswer with the letter of the right choice."
    worked, solution = _find(columns, SOLUTION)
    if answered and named is None and (answer_column or worked is None and not last):
        raise ValueError(_missing(row, "answer", [*ANSWER, *SOLUTION], answer_column))
    try:
        answer = _letter(gold, choices) if choices else _text(named, gold, from_hub)
    except ValueError:
        if answered:
            raise
        answer = ""
    whole = turns is not None or name.split(".")[-1] in WHOLE
    answer, solution = _gold(answer, last.get("content") if worked is None else solution)
    return dict(text=text, prompt=text if whole else "", turns=turns, answer=answer, solution=solution)


# --- columns ---


def _find(columns, names, option=None):
    """(name, value) of the column that the option names, else of the first of these that holds something,
    else of one that is there, else None.
    """
    empty = None, None
    for name in [option.lower()] if option else names:
        value = columns.get(name, ABSENT)
        if value is ABSENT and "." in name:
            value = _inside(columns, name)
        if value is not ABSENT and value not in (None, "", []):
            return name, value
        if value is not ABSENT:
            empty = name, value
    return empty


def _inside(value, path):
    """The value at a dotted path through objects, lists and JSON texts, or ABSENT."""
    for part in path.split("."):
        value = _parsed(value)
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return ABSENT
        value = {str(name).lower(): item for name, item in value.items()}.get(part, ABSENT)
    return value


def _missing(row, what, names, option):
    values = [(str(name), _parsed(value)) for name, value in row.items()]
    inner = [[f"{name}.{x}" for x in v] if isinstance(v, dict) and v else [name] for name, v in values]
    found = ", ".join(name for names in inner for name in names) or "nothing"
    need = f"has no column {option}" if option else f"has none of the columns {', '.join(names)}"
    how = f"name one with --{what}_column, as reward_model.ground_truth where one is inside another"
    return f"it {need}, but {found}; {how}"


def _parsed(value):
    """What JSON, or Python's print, of an object or a list in a cell holds; any other value as it is."""
    if not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    printed = value[:2] in ("['", "{'") or value[:3] == "[{'"
    try:
        return ast.literal_eval(value) if printed else json.loads(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _turns(value):
    """[{"role", "content"}] of messages as OpenAI and ShareGPT write them, with ORZ's "gold"; else None."""
    turns, found = _parsed(value), []
    for turn in turns if isinstance(turns, list) else [None]:
        role = isinstance(turn, dict) and (turn.get("role") or turn.get("from"))
        if not role:
            return None
        content = turn.get("content") or turn.get("value")
        if isinstance(content, list) and all(part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        found.append(dict(role=ROLES.get(role, role), content=content))
        if turn.get("ground_truth"):
            found[-1]["gold"] = turn["ground_truth"]
    return found


# --- answers ---

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # digits, letters and signs
WRAPPED = re.compile(
    r"\$\$?([^$]+)\$\$?|\*\*((?:(?!\*\*).)+)\*\*|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\]"
    r"|<answer>(.*)</answer>|`([^`]+)`|\"([^\"]+)\"",
    re.DOTALL,
)


def _text(name, answer, from_hub):
    """An answer column's value as text: numbers without an exponent, the one item of a list."""
    if isinstance(answer, dict) and "value" in answer:  # ORZ
        answer = answer["value"]
    listed = _parsed(answer)
    if isinstance(listed, list) and len(listed) == 1 and (listed is answer or isinstance(listed[0], str)):
        answer = listed[0]  # but "[5]" may be an answer
    if isinstance(answer, float | Decimal) and math.isfinite(answer) and not from_hub:
        return f"{Decimal(str(answer)):f}"
    if answer is None or isinstance(answer, str | int):
        return "" if answer is None else _stripped(str(answer))
    what = f"its {name} is {answer!r:.60}; it must be text or a number"
    why = ", and the package datasets changes dates, large integers and mixed columns when it reads JSON: "
    raise ValueError(
        what + (f"{why}give the path of the file, or another --answer_column" if from_hub else "")
    )


def _gold(answer, solution):
    """(bare answer, worked solution as text) of an answer, which may be a solution, and a column with one."""
    if turns := _turns(solution):
        solution = turns[-1]["content"]
    solution = solution if isinstance(solution, str) else ""  # only sft.py needs it
    if "####" in answer or "\\boxed" in answer:  # GSM8K
        solution, answer = answer, ""
    answer = answer or gold_of(solution)
    if "box" in solution and (boxed(solution) or "").endswith(f", {answer}"):  # the last one of several boxes
        answer = boxed(solution)
    answer = _stripped(answer.translate(FULL_WIDTH))
    while m := WRAPPED.fullmatch(answer):
        answer = _stripped(next(filter(None, m.groups()), ""))
    return answer, re.sub(r"<<[^<>\n]*>>", "", solution)  # GSM8K's calculator marks


def gold_of(solution):
    """The answer at the end of a worked solution, or what is an answer itself; else "".

    grading.extract_answer is for sampled text.
    """
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip().split("\n")[0]
    if "box" in solution:
        return boxed(solution) or ""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", solution)
    return solution if len(words) < 2 and "\n" not in solution.strip() else ""


def _stripped(text):
    return text if re.match(r"[\t-\r][a-z]", text) else text.strip()  # not the rest of \frac, \text, ..


def _choices(value):
    """[(label, text)] of a column with choices; [] if it holds something else."""
    value = _parsed(value)
    if isinstance(value, dict) and {"label", "text"} <= set(value):  # ARC
        return [(str(label).upper(), text) for label, text in zip(value["label"], value["text"])]
    if isinstance(value, dict) and all(len(name) == 1 for name in value):  # MedQA
        return [(label.upper(), text) for label, text in value.items() if text is not None]
    if not isinstance(value, list) or not all(isinstance(choice, str | int | float) for choice in value):
        return []
    texts = [str(choice).strip() for choice in value]
    labelled = [re.fullmatch(rf"\(?{a}[).:]\s*(.+)", text, re.DOTALL) for a, text in zip(LETTERS, texts)]
    return list(zip(LETTERS, [m[1] for m in labelled] if all(labelled) else texts))


def _letter(answer, choices):
    """The letter that stands before the right choice; answer: its label, its text, or its index from 0."""
    if isinstance(answer, list) and len(answer) == 1:
        (answer,) = answer
    answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    name, (labels, texts) = "" if answer is None else str(answer).strip(), zip(*choices)
    label = re.sub(r"^\(?(\w)[).:]?$", r"\1", name).upper()
    right = {i for i, text in enumerate(texts) if isinstance(answer, str) and str(text).strip() == name}
    if label in labels:
        right = {labels.index(label)}
    elif name.isdecimal() and int(name) < len(choices):
        right.add(int(name))
    if name and len(right) != 1:
        raise ValueError(
            f"its answer {answer!r:.60} is not the letter, the text or the index from 0 of one choice"
        )
    return LETTERS[right.pop()] if name else ""
