"""Problems and prompts: MATH and GSM8K from the hub, generated arithmetic, or a data set of your own.

    train, test = load("gsm8k")
    train, skipped = encode(train, tokenizer, max_prompt=1024)

The paper's prompt is the default template. docs/data.md says what is read of a row.
"""

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from support.columns import fields_of
from support.encoder import Encoder
from support.files import FILE_TYPES, HUB_NAME, Spool, folder_rows, hub_rows, read_rows
from support.golds import check_golds, say_what_repeats
from support.pretrained import end_of_turn
from tasks import arithmetic, worded

# All four models of the paper were tuned on this prompt; the response begins right after it.
PAPER_TEMPLATE = "[MATH_TASK] Problem:\n{problem}\n\nSolution:"
CHAT_TEMPLATES = {  # what a chat model is asked, inside its own chat markup
    "math": "{problem}\n\nReason step by step, and put your final answer within \\boxed{}.",
    "gsm8k": "{problem}\n\nReason step by step, one step per line, and end with a line '#### <number>'.",
}
BUILT_IN = {"arithmetic": arithmetic, "worded": worded}  # tasks that are generated
HUB = {"math": "nlile/hendrycks-MATH-benchmark", "gsm8k": "openai/gsm8k/main"}
BATCH = 1000  # problems that are tokenized at once


@dataclass
class Problem:
    prompt: str  # what the policy sees, template filled in; its response begins right after it
    answer: str  # the gold answer, bare: "72", "\\frac{1}{2}"
    solution: str = ""  # a worked solution where the dataset has one; only sft.py reads it
    prompt_ids: list[int] | None = None  # of the prompt, by encode
    text: str = ""  # the bare problem, inside of prompt
    where: str = ""  # its file and row, for messages
    turns: list[dict] | None = None  # messages before the prompt; None: it came as plain text
    row: dict = field(default_factory=dict)  # all columns of its data


class Problems(Sequence):
    """Those of the stored problems that are chosen, by index. They stay on disk (Spool): each is read, put into
    the template and encoded when it is asked for.
    """

    def __init__(self, stored, chosen, template=None, encoder=None):
        self.stored, self.chosen, self.template, self.encoder = stored, chosen, template, encoder

    def but(self, **changes):
        return Problems(**vars(self) | changes)

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        return self.but(chosen=self.chosen[i]) if isinstance(i, slice) else self._made([self.chosen[i]])[0]

    def __iter__(self):
        for start in range(0, len(self), BATCH):
            yield from self._made(self.chosen[start : start + BATCH])

    def _made(self, indices):
        problems = [self.stored[i] for i in indices]
        if self.template:
            for p in problems:
                p.prompt = self.template.replace("{problem}", p.text)
        if self.encoder:
            for p, ids in zip(problems, self.encoder(problems)):
                p.prompt_ids = ids
        return problems


def load(
    dataset, template=None, chat=False, system=None, problem_column=None, answer_column=None,
    eval_only=False, answered=True,
):  # fmt: skip
    """Read a dataset.

    dataset: "math", "gsm8k", "arithmetic", "worded"; the path of a .jsonl/.json/.csv/.parquet file or of a
    folder that holds a train.* and a test.* file of these types; or OWNER/NAME[/CONFIG][:SPLIT] on the hub. Of
    a single file or split every tenth row is a test problem. template: prompt text with the placeholder
    {problem}; None takes the paper's, or with chat one that asks for the answer's form; a row with a whole
    prompt gets neither. system: a system turn in place of the data's. problem_column, answer_column: where
    they stand. eval_only: all rows are test problems, if there is no test file. answered: a row needs an
    answer. Returns (train, test), two sequences of Problem. Raises ValueError, one line that says what, where
    and what to do.
    """
    if template is not None and "{problem}" not in template:
        problem = "has no {problem} in it: put {problem} where the problem goes"
        raise ValueError(f"--prompt_template {template!r} {problem}")
    path, from_hub = Path(dataset), False
    if dataset in BUILT_IN:
        splits = BUILT_IN[dataset].rows(20_000, 500)
    elif path.is_dir():
        splits = folder_rows(path, eval_only)
    elif path.is_file():
        splits = [read_rows(path)]
    elif dataset in HUB or HUB_NAME.fullmatch(str(dataset)) and path.suffix not in FILE_TYPES:
        splits, from_hub = hub_rows(HUB.get(dataset, dataset), eval_only), True
    elif path.suffix in FILE_TYPES or "/" in str(dataset):
        raise ValueError(f"--dataset {dataset}: no such file or folder")
    else:
        own = f"the path of a {'/'.join(FILE_TYPES)} file or folder, or OWNER/NAME on the hub"
        raise ValueError(f"--dataset {dataset} is not known: use {', '.join([*HUB, *BUILT_IN])}, or {own}")
    columns = problem_column, answer_column, answered, from_hub
    problems = [_problems(rows, chat, system, columns) for rows in splits]
    first = list(islice(problems[0], 100))
    problems[0] = chain(first, problems[0])
    stored = [Spool(split) for split in (problems[-1:] if eval_only else problems)]
    chosen = [range(len(split)) for split in stored]
    if eval_only:
        stored, chosen = [[], *stored], [[], *chosen]
    elif len(stored) == 1:
        stored, chosen = stored * 2, _held_out(stored[0], dataset)
    if template is None:
        template = "{problem}\n" if dataset in BUILT_IN else _template(dataset, first, chat, answered)
    return tuple(Problems(split, indices, template) for split, indices in zip(stored, chosen))


def load_for(s, answered=True):
    """load, with a program's settings."""
    columns = s.problem_column, s.answer_column, getattr(s, "eval_only", False), answered
    return load(s.dataset, s.prompt_template, s.chat, s.system, *columns)


def _problems(rows, chat, system, columns):
    """Yields the Problem of each row. Its prompt is without a template: "", or a row's whole prompt."""
    for where, row in rows:
        try:
            p = Problem(**fields_of(row, *columns), where=where, row=row)
            "".join([p.text, p.answer, p.solution, *(t["content"] for t in p.turns or [])]).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{where} holds half a character (a lone surrogate): write it again as UTF-8"
            ) from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if system is not None:
            p.turns = [turn for turn in p.turns or [] if turn["role"] != "system"]
            p.turns.insert(0, {"role": "system", "content": system})
        if p.turns and not chat:
            p.text = "\n\n".join([*(turn["content"] for turn in p.turns), p.text])
        yield p


def _held_out(problems, dataset):
    """(indices to train on, to test on) of a single file: every tenth, with the other rows of its problem."""
    if len(problems) < 2:
        need = "a single file needs at least two, one to train on and one to test on"
        raise ValueError(f"{dataset} has one row: {need}")
    held_out = range(9, len(problems), 10) if len(problems) >= 10 else [len(problems) - 1]
    texts = [hash(problems[i].text) for i in range(len(problems))]
    tested = {texts[i] for i in held_out}
    if tested == set(texts):  # or none would be left to train on
        texts, tested = range(len(problems)), held_out
    parts = array("q"), array("q")
    for i, text in enumerate(texts):
        parts[text in tested].append(i)
    return parts


def _template(dataset, first, chat, answered):
    """The prompt around problems like the first ones."""
    if first[0].prompt or chat and not answered:
        return "{problem}"
    if not chat:
        return PAPER_TEMPLATE
    numbers = all(re.fullmatch(r"[-$ \d.,/%]+", p.answer) for p in first)
    latex = "\\boxed" in first[0].solution or dataset == "math" or not numbers
    return CHAT_TEMPLATES["math" if latex else "gsm8k"]


def encode(problems, tokenizer, max_prompt, chat=False, chat_options=None, day=None):
    """The problems with the token ids of their prompts. chat, chat_options, day: see Encoder.

    Returns (kept, skipped): skipped counts the problems that are left out, since their prompt is
    longer than max_prompt. A token is at least a byte: only the prompts that may be too long are tokenized here.
    """
    if not isinstance(problems, Problems):
        problems = Problems(problems, range(len(problems)))
    encoder, around = Encoder(tokenizer, chat, chat_options, day), {}
    kept, unsure = array("q"), array("q")
    for i, p in zip(problems.chosen, problems):
        turns = encoder.turns(p)
        roles = tuple(turn["role"] for turn in turns)
        if roles not in around:  # tokens of the chat template, at most
            around[roles] = len(encoder([p])[0])
        texts = "".join([p.prompt, *(turn["content"] for turn in turns)])
        longest = len(texts if texts.isascii() else unicodedata.normalize("NFKC", texts).encode())
        (kept if around[roles] + longest <= max_prompt else unsure).append(i)
    counted = zip(unsure, problems.but(chosen=unsure, encoder=encoder))
    kept.extend(i for i, p in counted if len(p.prompt_ids) <= max_prompt)
    kept = problems.but(chosen=array("q", sorted(kept)), encoder=encoder)
    return kept, len(problems) - len(kept)


def encode_splits(splits, tokenizer, s, say=None, day=None, answered=True):
    """The problems of each split, encoded; raises ValueError if none of a split has a prompt that
    is short enough.

    s: settings with max_sequence, max_tokens, chat and chat_options. say: prints what stands out. day: see Encoder.
    answered: the gold answers are checked.
    """
    limit = s.max_sequence - s.max_tokens
    encoded, skipped = zip(*(encode(p, tokenizer, limit, s.chat, s.chat_options, day) for p in splits))
    if any(split and not kept for split, kept in zip(splits, encoded)):
        raise ValueError(f"every prompt is longer than --max_sequence - --max_tokens = {limit} tokens")
    plain = [kept.but(encoder=None) for kept in encoded]
    if answered:
        check_golds(chain(*plain), say)
    if say:
        say_what_repeats(*plain, say)
        if s.chat and (end := end_of_turn(tokenizer)) != tokenizer.eos_token:
            ends = f"a response ends at {end}, too, which ends" if end else "name a --stop: no token ends"
            say(f"--chat: {ends} an assistant's turn in the chat template")
        if not s.chat and plain[-1][0].turns is not None:
            say("the problems are messages, whose texts are joined: --chat puts them into the chat template")
        if sum(skipped):
            too_long = "their prompts are longer than --max_sequence - --max_tokens"
            say(f"skipped {sum(skipped)} problems: {too_long}")
    return encoded


def fingerprint(problems):
    """A hash of the problems that a run trains on, and of their rows."""
    found = hashlib.sha256()
    for p in problems.but(encoder=None) if isinstance(problems, Problems) else problems:
        found.update(repr((p.answer, p.row)).encode())
    return found.hexdigest()
