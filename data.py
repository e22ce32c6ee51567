"""Problems and prompts: MATH and GSM8K from the hub, generated arithmetic, or your own file.

    train, test = load("gsm8k")
    train, skipped = encode(train, tokenizer, max_prompt=1024)

The paper's prompt is the default template.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from pathlib import Path

from grader import Grader
from grading import boxed, extract_answer
from support.files import FILE_TYPES, only_file, read_rows
from support.model_files import in_one_line
from support.pretrained import end_of_turn
from tasks import arithmetic, worded

# All four models of the paper were tuned on this prompt; the response begins right after it.
PAPER_TEMPLATE = "[MATH_TASK] Problem:\n{problem}\n\nSolution:"
CHAT_TEMPLATES = {  # what a chat model is asked, inside its own chat markup
    "math": "{problem}\n\nReason step by step, and put your final answer within \\boxed{}.",
    "gsm8k": "{problem}\n\nReason step by step, one step per line, and end with a line '#### <number>'.",
}
MAX_BAD_ANSWERS = 0.03  # the largest share of gold answers that no response can match
BUILT_IN = {"arithmetic": arithmetic, "worded": worded}  # tasks that are generated
HUB = {"math": ("nlile/hendrycks-MATH-benchmark", None), "gsm8k": ("openai/gsm8k", "main")}


@dataclass(frozen=True)
class Problem:
    prompt: str  # what the policy sees, template filled in; its response begins right after it
    answer: str  # the gold answer, bare: "72", "\\frac{1}{2}"
    solution: str = ""  # a worked solution where the dataset has one; only sft.py reads it
    prompt_ids: list[int] | None = None  # of the prompt, by encode
    text: str = ""  # the bare problem, inside of prompt
    where: str = ""  # its file and row, for messages


def load(dataset, template=None, chat=False):
    """Read a dataset.

    dataset: "math", "gsm8k", "arithmetic", "worded", or the path of a .jsonl/.json/.csv/.parquet file or of a
    folder that holds a train.* and a test.* file of these types. A single file is split: every
    tenth row is a test problem. template: prompt text with the placeholder {problem}; None takes
    the paper's (or, with chat, one that asks for the answer's form). Returns (train, test), two
    lists of Problem. Raises ValueError, one line that says what, where and what to do.
    """
    if template is not None and "{problem}" not in template:
        problem = "has no {problem} in it: put {problem} where the problem goes"
        raise ValueError(f"--prompt_template {template!r} {problem}")
    path = Path(dataset)
    if dataset in BUILT_IN:
        rows = BUILT_IN[dataset].rows(20_000, 500)
    elif dataset in HUB:
        import datasets  # only the hub needs it

        splits = datasets.load_dataset(*HUB[dataset])
        rows = [
            [(f"{dataset} {split} row {i}", row) for i, row in enumerate(splits[split])]
            for split in ("train", "test")
        ]
    elif path.is_dir():
        rows = [read_rows(only_file(path, split)) for split in ("train", "test")]
    elif path.is_file():
        numbered = read_rows(path)
        if len(numbered) < 2:
            need = "a single file needs at least two, one to train on and one to test on"
            raise ValueError(f"{path} has one row: {need}")
        held_out = range(9, len(numbered), 10) if len(numbered) >= 10 else [len(numbered) - 1]
        texts = [str(_text(row)) for _, row in numbered]
        tested = {texts[i] for i in held_out}  # other rows of these problems are held out with them
        if tested == set(texts):  # or none would be left to train on
            texts, tested = range(len(numbered)), held_out
        rows = [[], []]
        for text, row in zip(texts, numbered):
            rows[text in tested].append(row)
    elif path.suffix in FILE_TYPES or len(path.parts) > 1:
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    else:
        own = f"the path of a {'/'.join(FILE_TYPES)} file or folder"
        known = ", ".join([*HUB, *BUILT_IN])
        raise ValueError(f"--dataset {dataset} is not known: use {known}, or {own}")
    train, test = ([_problem(where, row) for where, row in split] for split in rows)
    if template is None and dataset in BUILT_IN:
        template = "{problem}\n"
    elif template is None and chat:
        numbers = all(re.fullmatch(r"[-$ \d.,/%]+", p.answer) for p in train[:100])
        latex = "\\boxed" in train[0].solution or dataset == "math" or not numbers
        template = CHAT_TEMPLATES["math" if latex else "gsm8k"]
    elif template is None:
        template = PAPER_TEMPLATE
    return tuple(
        [replace(p, prompt=template.replace("{problem}", p.text)) for p in split] for split in (train, test)
    )


def encode(problems, tokenizer, max_prompt, chat=False, day=None):
    """The problems with the token ids of their prompts, by the tokenizer's own rule for BOS, or
    inside its chat template. day: a date, what the chat template takes for today.

    Returns (kept, skipped): skipped counts the problems that are left out, since their prompt is
    longer than max_prompt.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer of {tokenizer.name_or_path} has no chat template")
    texts = [_rendered(p.prompt, tokenizer, chat, day) for p in problems]
    ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"]  # a chat template writes its own BOS
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for i, p in enumerate(problems):
        if any(token in p.text for token in special):
            ids[i] = _with_problem_as_text(p, tokenizer, chat, day)
    ids = [_to_be_continued(i, text, tokenizer) for i, text in zip(ids, texts)]
    kept = [replace(p, prompt_ids=i) for p, i in zip(problems, ids) if len(i) <= max_prompt]
    return kept, len(problems) - len(kept)


def _rendered(prompt, tokenizer, chat, day):
    """The prompt, inside the tokenizer's chat template with chat."""
    if not chat:
        return prompt
    options = dict(add_generation_prompt=True, tokenize=False, strftime_now=(day or date.today()).strftime)
    with in_one_line(f"--chat: the chat template of {tokenizer.name_or_path} writes no prompt"):
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)


def _with_problem_as_text(p, tokenizer, chat, day):
    """Ids of a prompt whose problem spells special tokens: as plain text, so that none is obeyed."""
    mark = "\ue000"  # of private use
    before, *parts = _rendered(p.prompt.replace(p.text, mark), tokenizer, chat, day).split(mark)
    text = dict(add_special_tokens=False)
    ids = _to_be_continued(tokenizer(before, add_special_tokens=not chat)["input_ids"], before, tokenizer)
    for after in parts:
        ids += tokenizer(p.text, split_special_tokens=True, **text)["input_ids"]
        ids += tokenizer(after, **text)["input_ids"]
    return ids


def _to_be_continued(ids, text, tokenizer):
    """The ids of a prompt without an EOS that the tokenizer appends, and with BOS once."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is not None and ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def encode_splits(splits, tokenizer, s, say=None, day=None):
    """The problems of each split, encoded; raises ValueError if none of a split has a prompt that
    is short enough.

    s: settings with max_sequence, max_tokens and chat. say: prints how many were skipped. day: see encode.
    """
    limit = s.max_sequence - s.max_tokens
    encoded, skipped = zip(*(encode(problems, tokenizer, limit, s.chat, day) for problems in splits))
    if not all(encoded):
        raise ValueError(f"every prompt is longer than --max_sequence - --max_tokens = {limit} tokens")
    check_golds([p for split in encoded for p in split], say)
    if say:
        _say_what_repeats(encoded, say)
    if say and s.chat and (end := end_of_turn(tokenizer)) != tokenizer.eos_token:
        ends = f"a response ends at {end}, too, which ends" if end else "name a --stop: no token ends"
        say(f"--chat: {ends} an assistant's turn in the chat template")
    if sum(skipped) and say:
        say(f"skipped {sum(skipped)} problems: their prompts are longer than --max_sequence - --max_tokens")
    return encoded


def check_golds(problems, say=None):
    """Count the gold answers that no response can match; raise ValueError for more than MAX_BAD_ANSWERS of them."""
    bad = [(p, why) for p, why in zip(problems, _whats_wrong([p.answer for p in problems])) if why]
    if not bad:
        return
    shown = "; ".join(f"{p.where}: {p.answer[:60]!r} {why}" for p, why in bad[:3])
    text = f"no response can match {len(bad)} of {len(problems)} gold answers, the first: {shown}"
    if len(bad) > MAX_BAD_ANSWERS * len(problems):
        raise ValueError(f"{text} (at most {MAX_BAD_ANSWERS:.0%} of them may be so)")
    if say:
        say(text)


def _whats_wrong(golds):
    """Why no final answer of a response equals a gold, "" where one does, for each of them."""
    grader = Grader()
    equal_themselves = grader.grade([f"\\boxed{{{gold}}}" for gold in golds], golds)
    grader.close()
    for gold, equals_itself in zip(golds, equal_themselves):
        words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", gold)
        if re.search(r"[\x00-\x1f\x7f]", gold):
            yield "holds a control character (a LaTeX backslash must be two in JSON)"
        elif extract_answer(gold) is not None or len(words) > 8 or len(words) > 1 and gold[-1] in ".!?":
            yield "is a sentence, not a bare answer"
        else:
            yield "" if equals_itself else "does not equal itself for the grader, in a box"


def fingerprint(problems):
    """A hash of the problems that a run trains on."""
    rows = "\n".join(repr((p.prompt_ids, p.answer)) for p in problems)
    return hashlib.sha256(rows.encode()).hexdigest()


def _say_what_repeats(splits, say):
    """Problems of the test split that are trained on, and those with more than one gold answer."""
    train, test = ({p.prompt for p in split} for split in splits)
    if train & test:
        say(f"{len(train & test)} of {len(test)} test problems are training problems too")
    answers = {}
    for p in (p for split in splits for p in split):
        answers.setdefault(p.prompt, set()).add(p.answer)
    differ = [prompt for prompt, golds in answers.items() if len(golds) > 1]
    if differ:
        say(f"{len(differ)} problems have more than one gold answer, the first: {differ[0][:60]!r}")


def _text(row):
    return row.get("problem") or row.get("question")


def _problem(where, row):
    """Problem of one row; its prompt is still without a template."""
    text = _text(row)
    if not isinstance(text, str) or not text.strip():
        found = ", ".join(map(str, row)) or "none"
        raise ValueError(f"{where} has no problem: needs a column problem or question, found {found}")
    if "answer" not in row and "solution" not in row:
        raise ValueError(f"{where}: needs a column answer or solution, found {', '.join(map(str, row))}")
    answer = _as_text(row.get("answer"), where)
    solution = row.get("solution") or ""
    if not isinstance(solution, str):
        if not answer:
            raise ValueError(f"{where}: its solution is no text but {type(solution).__name__}")
        solution = ""  # only sft.py reads it
    if "####" in answer or "\\boxed" in answer:  # GSM8K's answer column is a solution
        solution, answer = answer, ""
    answer = answer or _gold(solution)
    if (boxed(solution) or "").endswith(f", {answer}"):  # the column holds the last of several boxes only
        answer = boxed(solution)
    if not answer:
        advice = "fill answer, or end the solution in \\boxed{..} or '#### n'"
        raise ValueError(f"{where} has no gold answer: {advice}")
    if any("\ud800" <= c <= "\udfff" for c in text + answer + solution):
        raise ValueError(f"{where} holds half a character (a lone surrogate): write it again as UTF-8")
    solution = re.sub(r"<<[^<>\n]*>>", "", solution)  # GSM8K's calculator marks
    return Problem(text, answer, solution, text=text, where=where)


def _as_text(answer, where):
    """The answer column's value as text; numbers without an exponent."""
    if isinstance(answer, float | Decimal) and math.isfinite(answer):
        return f"{Decimal(str(answer)):f}"
    if answer is not None and not isinstance(answer, str | int):
        raise ValueError(f"{where}: its answer is {answer!r:.60}; it must be text or a number")
    text = "" if answer is None else str(answer)
    return text if re.match(r"[\t-\r][a-z]", text) else text.strip()  # not the rest of \frac, \text, ..


def _gold(solution):
    """The answer at the end of a worked solution, or "" (grading.extract_answer reads sampled text)."""
    if "####" in solution:
        return solution.rsplit("####", 1)[1].strip()
    return boxed(solution) or ""
