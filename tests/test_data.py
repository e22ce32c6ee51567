"""Datasets load, templates fill, and every bad file gets one line that says where and what."""

import copy
import json
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED_DATA
from datasets import Dataset, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import data
import train
from support.columns import gold_of
from support.golds import check_golds
from tasks import worded


def run_chain(expression):
    """The value of a chain such as 8*9+6-7, worked from left to right, by other means than data.py's."""
    value, rest = int(expression[0]), expression[1:]
    for op, digit in zip(rest[::2], rest[1::2]):
        value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[op](int(digit))
        assert 0 <= value < 100
    return value


def test_arithmetic_is_right_disjoint_and_seeded():
    train, test = data.load("arithmetic")
    assert len(train) == 20_000 and len(test) == 500
    assert (
        not {p.prompt for p in train} & {p.prompt for p in test} and len({p.prompt for p in train}) == 20_000
    )
    assert list(map(list, data.load("arithmetic"))) == [list(train), list(test)]
    operations = set()
    for p in [*train[:3000], *test]:
        expression = p.prompt.removesuffix("?\n")
        operations.add(len(expression) // 2)
        assert str(run_chain(expression)) == p.answer
        assert len(p.solution.splitlines()) == len(expression) // 2 + 1
    assert operations == {5, 6, 7, 8, 9}


def test_the_demonstrator_slips_on_carries_and_borrows_alone_and_goes_on_from_the_wrong_number():
    hard, slipped = {"+": 0, "-": 0, "*": 0}, {"+": 0, "-": 0, "*": 0}
    for p in data.load("arithmetic")[0][:5000]:
        *lines, last = p.solution.splitlines()
        value = int(p.prompt[0])
        for line, op, digit in zip(lines, p.prompt[1::2], p.prompt[2::2]):
            before, result = line.split("=")
            assert before == f"{value}{op}{digit}"
            ones, truth = (
                value % 10,
                {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[op](int(digit)),
            )
            is_hard = {
                "+": ones + int(digit) > 9,
                "-": ones < int(digit),
                "*": value > 9 and ones * int(digit) > 9,
            }[op]
            assert is_hard or int(result) == truth
            hard[op] += is_hard
            slipped[op] += int(result) != truth
            value = int(result)
        assert last == f"#### {value}"
    for op, rate in {"+": 0.15, "-": 0.15, "*": 0.55}.items():
        assert slipped[op] / hard[op] == pytest.approx(rate, abs=0.04)


WORDED_LINE = re.compile(r"(\w+) ([+-]\d): [a-z ]+, [a-z]+ (\d+) [a-z]+ (\d+)")


def test_worded_is_right_disjoint_and_seeded_and_its_errors_stay():
    train, test = data.load("worded")
    assert len({p.prompt for p in train}) == 20_000 and len(test) == 500
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert list(map(list, data.load("worded"))) == [list(train), list(test)]
    hard = slipped = wrong = 0
    for p in [*train[:3000], *test]:
        start, told = p.text.removesuffix("?").split(" crates, ")
        months, changes = told.split()[::2], [int(change) for change in told.split()[1::2]]
        truth = value = int(start)
        *lines, last = p.solution.splitlines()
        for month, change, line in zip(months, changes, lines, strict=True):
            found = WORDED_LINE.fullmatch(line)
            assert found[1] == month and int(found[2]) == change and int(found[3]) == value
            carries = not 0 <= value % 10 + change < 10
            before, right, truth, value = value, value == truth, truth + change, int(found[4])
            slip = value < max(0, before + change)
            # a slip loses a ten, but never more than the stock has
            assert (
                value == max(0, before + change - 10 * slip) and (carries or not slip) and 20 <= truth < 100
            )
            assert right or value != truth  # no error is repaired
            hard, slipped = hard + carries, slipped + slip
        assert last == f"#### {value}" and p.answer == str(truth) and len(lines) == 12
        wrong += value != truth
    assert slipped / hard == pytest.approx(0.12, abs=0.01) and 0.4 < wrong / 3500 < 0.6


def test_the_lines_of_worded_are_free_and_its_tokens_spell_them(tmp_path):
    worded.tiny_model(tmp_path, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    problems, firsts = data.load("worded")[1][:200], Counter()
    for p in problems:
        ids = tokenizer(p.prompt + p.solution, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == p.prompt + p.solution and tokenizer.pad_token_id not in ids
        for line in p.solution.splitlines()[:-1]:
            assert 15 <= len(tokenizer(line)["input_ids"]) <= 40
            firsts[line.split()[2]] += 1
    # equally good: none of them is drawn much more often
    assert set(firsts) == set(worded.OPENINGS) and max(firsts.values()) < 1.5 * min(firsts.values())


@pytest.mark.parametrize("task", data.BUILT_IN)
def test_the_presets_of_a_built_in_task_fit_its_problems_and_model(task, tmp_path):
    data.BUILT_IN[task].tiny_model(tmp_path, 0)
    tokenizer, s = AutoTokenizer.from_pretrained(tmp_path), train.parse_settings(["--dataset", task])
    problems, skipped = data.encode(data.load(task)[1], tokenizer, s.max_sequence - s.max_tokens)
    longest = max(len(tokenizer(p.solution)["input_ids"]) for p in problems)  # BOS for EOS
    assert skipped == 0 and longest < 0.9 * s.max_tokens
    assert s.max_sequence <= AutoConfig.from_pretrained(tmp_path).max_position_embeddings


def test_gsm8k_and_math_load_by_path(shared_data):
    train, test = data.load(shared_data / "gsm8k")
    assert len(train) == 7473 and len(test) == 1319
    assert (
        test[0].answer == "18"
        and test[0].prompt.startswith("[MATH_TASK] Problem:\nJanet")
        and test[0].prompt.endswith("\n\nSolution:")
    )
    assert test[0].solution.startswith(
        "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n"
    )  # without calculator marks
    assert {p.answer for p in test} >= {"70000", "2,125"} or all(p.answer for p in test)
    train, test = data.load(shared_data / "math")
    assert len(train) == 800 and len(test) == 200 and test[0].answer == "135"


def test_math_gold_answers_follow_from_the_solutions(shared_data):
    rows = [json.loads(line) for line in (shared_data / "math" / "train.jsonl").read_text().splitlines()]
    found = [gold_of(row["solution"]) == row["answer"] for row in rows]
    assert sum(found) / len(found) > 0.97  # the rest writes \boxed without braces or spaces otherwise


@pytest.mark.parametrize(
    "solution,column,gold",
    [
        (r"so $x$ is $\boxed{-1}$ or $\boxed{2}$.", None, "-1, 2"),
        (r"so $x$ is $\boxed{-1}$ or $\boxed{2}$.", "2", "-1, 2"),  # a column that holds the last one only
        (r"first $\boxed{-1}$, which is wrong, then $\boxed{2}$.", "2", "2"),
        (r"the point is \boxed{(1, 2)}", "(1, 2)", "(1, 2)"),
        (r"it is $\boxed 7$.", None, "7"),
        (r"it is \fbox{7}.", None, "7"),
    ],
)
def test_boxes_that_end_a_solution_together_are_one_gold_answer(tmp_path, solution, column, gold):
    row = {"problem": "?", "solution": solution} | ({"answer": column} if column else {})
    write(tmp_path / "own.jsonl", [row, row])
    assert [p.answer for split in data.load(tmp_path / "own.jsonl") for p in split] == [gold, gold]


@pytest.mark.parametrize("name", ["math", "gsm8k"])
def test_hub_datasets_are_read_by_their_columns(monkeypatch, name):
    rows = {
        "math": {
            "problem": "1+1?",
            "solution": "It is $\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
        },
        "gsm8k": {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    }[name]
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return {"train": [rows], "test": [rows]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (problem,), _ = data.load(name)
    assert asked == [
        {"math": ("nlile/hendrycks-MATH-benchmark", None), "gsm8k": ("openai/gsm8k", "main")}[name]
    ]
    assert problem.prompt == "[MATH_TASK] Problem:\n1+1?\n\nSolution:" and problem.answer == "2"
    assert "<<" not in problem.solution and problem.solution


SETTINGS = SimpleNamespace(max_sequence=100, max_tokens=10, chat=False, chat_options=None)
ROWS = [{"question": f"What is {i}, plus\n1?", "answer": str(i + 1)} for i in range(20)]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        import csv

        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_own_files_of_every_type(tmp_path, suffix):
    train, test = data.load(write(tmp_path / f"mine{suffix}", ROWS))
    assert len(train) == 18 and [p.answer for p in test] == ["10", "20"]
    assert "What is 9, plus\n1?" in test[0].prompt
    write(tmp_path / f"train{suffix}", ROWS[:12])
    write(tmp_path / f"test{suffix}", ROWS[12:])
    train, test = data.load(tmp_path)
    assert len(train) == 12 and len(test) == 8


@pytest.mark.parametrize(
    "solution,gold",
    [
        ("a\n#### 1,080", "1,080"),
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{\\text{a}}", "\\text{a}"),
    ],
)
def test_the_gold_answer_may_stand_at_the_end_of_the_solution(tmp_path, solution, gold):
    train, test = data.load(write(tmp_path / "a.jsonl", [{"problem": "x", "solution": solution}] * 2))
    assert train[0].answer == test[0].answer == gold


def test_templates():
    assert data.load("arithmetic", "Q: {problem}\nA: {literal}")[1][0].prompt.startswith("Q: 1+9*7")
    assert "boxed{}" not in data.load("arithmetic", chat=True)[1][0].prompt
    with pytest.raises(ValueError, match=r"--prompt_template 'Q: ' has no \{problem\}"):
        data.load("arithmetic", "Q: ")


def test_long_prompts_are_skipped_and_counted(tokenizer):
    _, problems = data.load("arithmetic")
    lengths = [len(p.prompt) + 1 for p in problems]  # one token a character, and BOS
    kept, skipped = data.encode(problems, tokenizer, 16)
    assert skipped == sum(n > 16 for n in lengths) > 0 and len(kept) + skipped == len(problems)
    for p in kept:
        assert p.prompt_ids[0] == tokenizer.bos_token_id and tokenizer.decode(p.prompt_ids[1:]) == p.prompt


def test_chat_prompts_stand_in_the_chat_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}={{ m['content'] }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    )
    problem = data.load("arithmetic")[1][0]
    (encoded,), _ = data.encode([problem], tokenizer, 100, chat=True)
    assert tokenizer.decode(encoded.prompt_ids) == f"={problem.prompt}#"
    tokenizer.chat_template = None


GOOD = '{"problem": "p", "answer": "1"}\n'
BAD_FILES = [  # file name, content, what the message must say
    ("a.jsonl", "", ["a.jsonl", "empty"]),
    ("a.jsonl", GOOD + "{oops}\n", ["a.jsonl", "line 2"]),
    ("a.jsonl", GOOD + "[1]\n", ["a.jsonl line 2", "not an object"]),
    (
        "a.jsonl",
        GOOD + '{"text": "p", "label": "1"}\n',
        ["a.jsonl line 2", "none of the columns problem, question", "text, label", "--problem_column"],
    ),
    (
        "a.jsonl",
        GOOD + '{"problem": "p", "label": "1"}\n',
        ["a.jsonl line 2", "none of the columns answer", "problem, label", "--answer_column"],
    ),
    ("a.jsonl", GOOD + '{"problem": "", "answer": "1"}\n', ["a.jsonl line 2", "problem is ''"]),
    ("a.jsonl", GOOD + '{"problem": 5, "answer": "1"}\n', ["a.jsonl line 2", "problem is 5"]),
    (
        "a.jsonl",
        GOOD + '{"prompt": [{"role": "system", "content": "s"}], "answer": "1"}\n',
        ["a.jsonl line 2", "messages that end with a user's"],
    ),
    (
        "a.jsonl",
        GOOD + '{"question": "p", "choices": ["5", "6"], "answer": "7"}\n',
        ["line 2", "'7'", "of one choice"],
    ),
    (
        "a.jsonl",
        GOOD + '{"question": "p", "choices": ["1", "6"], "answer": "1"}\n',
        ["line 2", "'1'", "of one choice"],
    ),
    ("a.jsonl", GOOD, ["a.jsonl", "one row"]),
    ("a.json", "[", ["a.json", "cannot be read"]),
    ("a.json", "{}", ["a.json", "not a list"]),
    ("a.csv", "problem,answer\na,1\nb\n", ["a.csv", "line 3", "2 fields"]),
    ("a.csv", "problem,answer\n", ["a.csv", "empty"]),
    ("a.parquet", "no parquet", ["a.parquet", "cannot be read"]),
    ("a.txt", "x", ["a.txt", "unknown file type", ".jsonl"]),
]


@pytest.mark.parametrize("name,content,words", BAD_FILES)
def test_bad_files_get_one_clear_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        data.load(path)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_unknown_names_and_missing_files(tmp_path):
    known = "--dataset mth is not known: use math, gsm8k, arithmetic, worded, or the path"
    with pytest.raises(ValueError, match=known):
        data.load("mth")
    for path in (
        tmp_path / "none.jsonl",
        tmp_path / "none",
        "./none",
        "../none/x",
        "none/x.jsonl",
        "a/b/c/d",
    ):
        with pytest.raises(ValueError, match=f"--dataset {path}: no such file or folder$"):
            data.load(path)
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match=r"exactly one test file \(test.jsonl, .*it holds train.jsonl"):
        data.load(tmp_path)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash_the_reader(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "arbitrary.jsonl"
    path.write_bytes(content)
    try:
        data.load(path)
    except ValueError as error:
        assert "\n" not in str(error)


# --- files and tokenizers of other people ---


def test_a_csv_of_a_spreadsheet_has_a_byte_order_mark(tmp_path):
    (tmp_path / "d.csv").write_text("problem,answer\n1+1?,2\n2+2?,4\n", encoding="utf-8-sig")
    assert [p.answer for split in data.load(tmp_path / "d.csv") for p in split] == ["2", "4"]


def test_a_broken_csv_names_the_line(tmp_path):
    (tmp_path / "d.csv").write_text('problem,answer\n1+1?,2\n"2+2?"x,4\n')
    with pytest.raises(ValueError, match="after line 2"):
        data.load(tmp_path / "d.csv")


def test_rows_of_one_problem_are_held_out_together(tmp_path):
    rows = [{"problem": f"{i % 12}+1?", "answer": str(i % 12 + 1)} for i in range(36)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, test = data.load(tmp_path / "d.jsonl")
    assert len(train) + len(test) == 36 and test
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_what_repeats_is_said(tmp_path, tokenizer):
    rows = dict(train=[("1+1?", "2"), ("1+1?", "3"), ("2+2?", "4")], test=[("2+2?", "4"), ("3+3?", "6")])
    for split, found in rows.items():
        lines = [json.dumps(dict(problem=problem, answer=answer)) for problem, answer in found]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    said = []
    data.encode_splits(data.load(tmp_path), tokenizer, SETTINGS, said.append)
    assert said[0] == "1 of 2 test problems are training problems too"
    assert said[1].startswith("1 problems have more than one gold answer, the first:") and "1+1?" in said[1]


def test_a_prompt_ends_without_eos_and_begins_with_bos_once(tokenizer):
    """Whatever the tokenizer appends, and also where a template brings BOS along."""
    plain = tokenizer("1+1?\n")["input_ids"]
    adds, bos, eos = copy.deepcopy(tokenizer), tokenizer.bos_token, tokenizer.eos_token
    ids = [(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    template = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    adds.backend_tokenizer.post_processor = template
    assert adds("1+1?\n")["input_ids"] == [*plain, tokenizer.eos_token_id]
    for prompt in ("1+1?\n", f"{bos}1+1?\n"):
        (found,), _ = data.encode([data.Problem(prompt, "2")], adds, 100)
        assert found.prompt_ids == plain


def test_special_tokens_in_a_problem_are_text(tokenizer):
    """Else a problem could end its own turn; those of the template are tokens."""
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    p = data.Problem(f"{bos}1{eos}+1?\n", "2", text=f"1{eos}+1?")
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}\n{{ eos_token }}"
    for chat in (False, True):
        (found,), _ = data.encode([p if not chat else replace(p, prompt=p.text)], chatty, 100, chat)
        ids = found.prompt_ids
        assert ids.count(tokenizer.eos_token_id) == chat and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.convert_tokens_to_ids("1") in ids


def test_a_problem_that_stands_twice_in_the_template_is_text_twice(tokenizer):
    """Also where nothing of the template comes before it, and where a message before it spells special tokens."""
    eos, digit = tokenizer.eos_token, tokenizer.convert_tokens_to_ids("1")
    p = data.Problem(f"1{eos}+1? 1{eos}+1?\n", "2", text=f"1{eos}+1?")
    (found,), _ = data.encode([p], tokenizer, 100)
    plain = replace(p, prompt="1+1? 1+1?\n", text="1+1?")
    expected = list(data.encode([plain], tokenizer, 100)[0])[0].prompt_ids
    as_text = tokenizer(eos, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in found.prompt_ids and found.prompt_ids.count(digit) == 4
    assert len(found.prompt_ids) == len(expected) + 2 * len(as_text)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    spelled = replace(p, turns=[{"role": "system", "content": f"1{eos}"}])
    (found,), _ = data.encode([spelled], chatty, 100, chat=True)
    assert found.prompt_ids.count(tokenizer.eos_token_id) == 2  # one behind each turn


def test_a_template_may_name_the_problem_twice_and_the_tokenizer_append_eos(tokenizer):
    eos = tokenizer.eos_token
    chatty = copy.deepcopy(tokenizer)
    chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    chatty.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}={{ messages[0]['content'] }}="
    for text in ("1+1", f"1{eos}+1", eos):
        p = data.Problem(f"{text}?\n{text}=", "2", text=text)
        (plain,), _ = data.encode([p], chatty, 100)
        (chat,), _ = data.encode([replace(p, prompt=text)], chatty, 100, chat=True)
        assert plain.prompt_ids[0] == chat.prompt_ids[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token_id not in plain.prompt_ids + chat.prompt_ids
        assert tokenizer.decode(plain.prompt_ids[1:]).count("1") == 4 * (text != eos)


def test_half_a_character_is_refused_with_its_place(tmp_path):
    (tmp_path / "d.jsonl").write_text(
        '{"problem": "1+1?", "answer": "2"}\n{"problem": "\\ud83d?", "answer": "2"}'
    )
    with pytest.raises(ValueError, match="line 2 holds half a character"):
        data.load(tmp_path / "d.jsonl")


GOLDS = [  # as JSON; what is wrong with them, or the answer that they are
    ("72", "72"),
    ("1e-05", "0.00001"),
    ("1e22", "10000000000000000000000"),
    ("-0.5", "-0.5"),
    ('"ellipse"', "ellipse"),
    (r'"\\text{at most one}"', r"\text{at most one}"),
    ('"The answer is 72."', "is a sentence"),
    ('"She sold 72 clips."', "is a sentence"),
    ('"the sum of the first seven odd numbers is 49"', "is a sentence"),
    (r'"\frac{1}{2}"', "holds a control character"),
    (r'"\text{four}"', "holds a control character"),
    (r'"7\u0000"', "holds a control character"),
    (r'"\\frac{1}{2"', "does not equal itself"),
    ('"</think>"', "does not equal itself"),
    # what is put around an answer is not the answer
    (r'"[\"82\"]"', "82"),
    ('["82"]', "82"),
    ("[72]", "72"),
    ("\"['82']\"", "82"),
    (r'"[\"\\\\frac{1}{2}\"]"', r"\frac{1}{2}"),
    ('"$34$"', "34"),
    ('"$$34$$"', "34"),
    (r'"\\(34\\)"', "34"),
    ('"**34**"', "34"),
    ('"<answer>34</answer>"', "34"),
    ('"<answer> $34$ </answer>"', "34"),
    ('"`34`"', "34"),
    (r'"\"34\""', "34"),
    ('"\uff13\uff14"', "34"),
    ('"1\uff0c080"', "1,080"),
    ('"\u22123"', "\u22123"),
    # but these are
    ('"[5]"', "[5]"),
    ('"[1, 2]"', "[1, 2]"),
    ('"$5$ and $6$"', "$5$ and $6$"),
    (r'"\\$5"', r"\$5"),
    ('"2**3"', "2**3"),
    ('"x\u00b2"', "x\u00b2"),
    (r'"$\frac{1}{2}$"', "holds a control character"),
    ('"proof"', "is no answer"),
    ('"Proof"', "is no answer"),
    ('"notfound"', "is no answer"),
    ('"not found"', "is no answer"),
    ('""', "is no answer"),
    ("null", "is no answer"),
]


@pytest.mark.parametrize("gold, expected", GOLDS)
def test_golds_that_no_response_can_match_are_counted_and_named(gold, expected, tmp_path, tokenizer):
    """No more than the share that is let through; a training run of them alone is refused."""
    rows = ['{"problem": "1+1?", "answer": "2"}', f'{{"problem": "2+2?", "answer": {gold}}}']
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    splits, said = data.load(tmp_path / "d.jsonl"), []
    problems = [p for split in splits for p in split]
    check_golds(problems, said.append, most=0.5)
    if not said:
        assert problems[1].answer == expected
        return
    assert said[0].startswith("no response can match 1 of 2 gold answers, the first: ")
    assert expected in said[0] and "d.jsonl line 2" in said[0] and "\n" not in said[0]
    with pytest.raises(ValueError, match="no more than 3% are let through"):
        data.encode_splits(splits, tokenizer, SETTINGS)


@pytest.mark.parametrize("gold", ['{"numbers": 72}', '["1", "2"]', "[[1, 2]]", "NaN", "Infinity"])
def test_a_gold_that_is_no_text_and_no_number_is_refused(gold, tmp_path):
    rows = ['{"problem": "1+1?", "answer": "2"}', f'{{"problem": "2+2?", "answer": {gold}}}']
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="line 2: its answer is .*; it must be text or a number"):
        data.load(tmp_path / "d.jsonl")


def test_bytes_and_decimals_of_a_parquet_file(tmp_path):
    table = dict(problem=["1+1?", "2+2?"], answer=[Decimal("2.50"), Decimal("1E+3")])
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "d.parquet")
    assert [p.answer for split in data.load(tmp_path / "d.parquet") for p in split] == ["2.50", "1000.00"]
    pyarrow.parquet.write_table(pyarrow.table(table | dict(answer=[b"2", b"4"])), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="row 1: its answer is b'2'"):
        data.load(tmp_path / "d.parquet")


def test_a_map_of_a_parquet_file_is_an_object(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    model = pyarrow.array([[("ground_truth", "2")], [("ground_truth", "4")]], kind)
    table = pyarrow.table(dict(problem=["1+1?", "2+2?"], reward_model=model))
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert [p.answer for split in data.load(tmp_path / "d.parquet") for p in split] == ["2", "4"]


def test_the_golds_of_gsm8k_and_math_are_all_right(shared_data, tokenizer):
    for name in ("gsm8k", "math"):
        problems = [p for split in data.load(shared_data / name) for p in split]
        check_golds(problems, most=0)


@pytest.mark.parametrize("answer, form", [("\\frac{1}{2}", "boxed"), ("1,080", "####"), ("-3.5", "####")])
def test_chat_asks_for_the_form_that_the_answers_have(answer, form, tmp_path):
    rows = [json.dumps({"problem": f"p{i}", "answer": answer}) for i in range(3)]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    train, _ = data.load(tmp_path / "d.jsonl", chat=True)
    assert form in train[0].prompt


def test_the_fingerprint_of_problems_sees_another_gold_answer():
    p = data.Problem("1+1?", "2", prompt_ids=[1, 2])
    assert (
        data.fingerprint([p]) == data.fingerprint([replace(p)]) != data.fingerprint([replace(p, answer="3")])
    )


# --- data as the field has it ---

SHARED_CASES = SHARED_DATA.parent / "cases" / "data"
ASKED = "What is 1+2?"
USER, SYSTEM = dict(role="user", content=ASKED), dict(role="system", content="You are a maths tutor.")
CHOSEN = f"{ASKED}\n\nA. 2\nB. 3\nC. 7\n\nAnswer with the letter of the right choice."
FORMATS = {  # row: what is read of it without any option: the problem, the messages before it, the gold answer
    "GSM8K": (dict(question=ASKED, answer="1+2=<<1+2=3>>3\n#### 3"), ASKED, None, "3"),
    "MATH": (dict(problem=ASKED, solution=r"It is $\boxed{3}$.", answer="3"), ASKED, None, "3"),
    "NuminaMath": (
        dict(
            problem=ASKED, solution=r"So $\boxed{3}$.", messages=[USER, dict(role="assistant", content="3")]
        ),
        *(ASKED, None, "3"),
    ),
    "AIME": (dict(ID="2024-I-1", Problem=ASKED, Solution=["a", "b"], Answer=3), ASKED, None, "3"),
    "verl": (
        dict(data_source="math", prompt=[USER], reward_model=dict(style="rule", ground_truth="3")),
        *(ASKED, [], "3"),
    ),
    "verl, system turn": (
        dict(prompt=[SYSTEM, USER], reward_model=dict(ground_truth='["3"]'), extra_info=dict(answer="4")),
        *(ASKED, [SYSTEM], "3"),
    ),
    "verl, JSON in cells": (
        dict(prompt=json.dumps([SYSTEM, USER]), reward_model='{"ground_truth": "3"}'),
        *(ASKED, [SYSTEM], "3"),
    ),
    "verl, printed into cells": (
        dict(prompt=str([SYSTEM, USER]), reward_model=str(dict(ground_truth="3"))),
        *(ASKED, [SYSTEM], "3"),
    ),
    "DAPO, processed": (dict(prompt=ASKED, solution="3", source_prompt=[USER]), ASKED, None, "3"),
    "TRL, prompt and solution": (dict(prompt=[USER], solution="$3$"), ASKED, [], "3"),
    "TRL, messages and solution": (
        dict(messages=[SYSTEM, USER], solution=r"$\boxed{3}$"),
        ASKED,
        [SYSTEM],
        "3",
    ),
    "TRL, prompt and completion": (
        dict(prompt=[USER], completion=[dict(role="assistant", content="1+2=3\n#### 3")]),
        *(ASKED, [], "3"),
    ),
    "messages with the solution": (
        dict(messages=[USER, dict(role="assistant", content=r"\boxed{3}")]),
        *(ASKED, [], "3"),
    ),
    "messages with an example": (
        dict(messages=[SYSTEM, USER, dict(role="assistant", content="3"), USER], answer=3),
        *(ASKED, [SYSTEM, USER, dict(role="assistant", content="3")], "3"),
    ),
    "messages in parts": (
        dict(messages=[dict(role="user", content=[dict(type="text", text=ASKED)])], answer="3"),
        *(ASKED, [], "3"),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": "#### 3"}]},
        *(ASKED, [], "3"),
    ),
    "ORZ": (
        [{"from": "human", "value": ASKED}, {"from": "assistant", "ground_truth": {"value": "3"}}],
        *(ASKED, [], "3"),
    ),
    "ORZ, read by datasets": (
        {"0": {"from": "human", "value": ASKED}, "1": {"from": "assistant", "ground_truth": {"value": "3"}}},
        *(ASKED, [], "3"),
    ),
    "MMLU": (dict(question=ASKED, choices=["2", "3", "7"], answer=1), CHOSEN, None, "B"),
    "MMLU, letter": (dict(question=ASKED, choices=["2", "3", "7"], answer="(b)"), CHOSEN, None, "B"),
    "MMLU, text": (dict(question=ASKED, choices=["2", "3", "7"], answer="3"), CHOSEN, None, "B"),
    "MMLU, index as text": (dict(question=ASKED, choices='["2", "3", "7"]', answer="1"), CHOSEN, None, "B"),
    "MMLU-Pro": (
        dict(question=ASKED, options=["2", "3", "7"], answer="B", answer_index=1),
        CHOSEN,
        None,
        "B",
    ),
    "AQuA": (dict(question=ASKED, options=["A)2", "B)3", "C)7"], answer="B"), CHOSEN, None, "B"),
    "MedQA": (dict(question=ASKED, options=dict(A="2", B="3", C="7"), answer="B"), CHOSEN, None, "B"),
    "ARC": (
        dict(question=ASKED, choices=dict(text=["2", "3", "7"], label=["1", "2", "3"]), answerKey="2"),
        *(CHOSEN, None, "B"),
    ),
    "choices in columns": (
        dict(Question=ASKED, A="2", B="3", C="7", D="9", Answer="B"),
        *(CHOSEN.replace("C. 7", "C. 7\nD. 9"), None, "B"),
    ),
    "columns that are no choices": (dict(question=ASKED, a=1, b=2, c=0, d=0, answer=3), ASKED, None, "3"),
    "choices that are none": (dict(question=ASKED, options=dict(hard=True), answer="3"), ASKED, None, "3"),
}


@pytest.mark.parametrize("row, text, turns, answer", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_formats_of_the_field_are_read_without_options(row, text, turns, answer, suffix, tmp_path):
    if suffix == ".parquet" and isinstance(row, list):
        pytest.skip("a row of parquet has columns")
    path = write(tmp_path / f"d{suffix}", [row, row])
    (p,), _ = data.load(path, chat=True)
    assert (p.text, p.answer) == (text, answer) and (turns is None) == (p.turns is None)
    assert [(t["role"], t["content"]) for t in p.turns or []] == [
        (t["role"], t["content"]) for t in turns or []
    ]
    assert (
        p.row == ({"conversations": row} if isinstance(row, list) else row)
        or "0" in row
        or suffix == ".parquet"
    )
    check_golds([p], most=0)
    # a whole prompt stays as it is; else the form of the answer is asked for
    assert (p.prompt == text) == (turns is not None or "prompt" in row) and p.prompt.startswith(text)
    joined = "\n\n".join([*(t["content"] for t in turns or []), text])
    assert joined in data.load(path)[0][0].prompt


def test_columns_are_named_by_options_and_listed_when_one_is_missing(tmp_path):
    row = {"Task": {"Text": ASKED}, "labels": ["3", "4"], "answer": "5", "a.b": "6"}
    path = write(tmp_path / "d.jsonl", [row, row])
    for answer, gold in (("labels.1", "4"), ("answer", "5"), ("a.b", "6")):
        p = data.load(path, problem_column="Task.Text", answer_column=answer)[0][0]
        assert (p.text, p.answer) == (ASKED, gold) and p.row == row
    for options in (
        {},
        dict(problem_column="Text"),
        dict(problem_column="Task.text", answer_column="labels.2"),
    ):
        with pytest.raises(
            ValueError, match=r"line 1: it has .*Task.Text, labels, answer, a.b; .*_column"
        ) as error:
            data.load(path, **options)
        assert ("--answer_column" in str(error.value)) == ("answer_column" in options)


def test_a_system_turn_is_set_by_an_option(tmp_path, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}\n{% endfor %}"
    for row in (
        dict(problem="1?", answer=1),
        dict(prompt=[SYSTEM, dict(role="user", content="1?")], answer=1),
    ):
        path = write(tmp_path / "d.jsonl", [row, row])
        problems, _ = data.load(path, "{problem}", chat=True, system="2")
        (p,), _ = data.encode(problems, chatty, 100, chat=True)
        assert p.prompt_ids == chatty("s2\nu1?\n", add_special_tokens=False)["input_ids"]
        assert data.load(path, "{problem}", system="2")[0][0].prompt == "2\n\n1?"


def test_options_go_to_the_chat_template(tokenizer):
    chatty, p = copy.deepcopy(tokenizer), data.Problem("1?", "1")
    chatty.chat_template = "{{ messages[0]['content'] }}{% if thinks %}1{% else %}0{% endif %}"
    ids = {
        options: data.encode([p], chatty, 100, True, options)[0][0].prompt_ids
        for options in (None, '{"thinks": true}', '{"thinks": false}')
    }
    assert ids[None] == ids['{"thinks": false}'] != ids['{"thinks": true}']
    wrong = [
        ('{"thought": 1}', True, "no variable thought"),
        ("[1]", True, "no JSON object"),
        ("{", True, "no JSON"),
    ]
    for options, chat, message in [*wrong, ('{"thinks": true}', False, "add --chat")]:
        with pytest.raises(ValueError, match=message):
            data.encode([p], chatty, 100, chat, options)


def test_what_a_chat_template_does_not_take_is_one_line(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ raise_exception('no system turn') if messages[0].role == 'system' else 'x' }}"
    problems = [data.Problem("1?", "1", turns=turns) for turns in (None, [SYSTEM])]
    with pytest.raises(ValueError, match="writes no prompt for the roles system, user .*no system turn"):
        data.encode(problems, chatty, 100, chat=True)


class Hub:
    """Stands in for datasets.load_dataset."""

    def __init__(self, **splits):
        self.splits, self.asked = splits, []

    def __call__(self, name, config):
        self.asked.append((name, config))
        if name == "o/two" and not config:
            raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")
        if name == "o/many" and not config:
            raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")
        if name == "o/none":
            raise FileNotFoundError("Dataset 'o/none' doesn't exist on the Hub")
        return {split: Dataset.from_list(rows) for split, rows in self.splits.items()}


@pytest.fixture
def hub(monkeypatch):
    """Makes a hub whose sets have n rows in each split, with its name as their problem."""

    def made(**numbers):
        rows = {
            name: [{"question": f"{name} {i}?", "answer": "1"} for i in range(n)]
            for name, n in numbers.items()
        }
        made = Hub(**rows)
        monkeypatch.setattr("datasets.load_dataset", made)
        return made

    return made


@pytest.mark.parametrize(
    "splits, name, train, test",
    [
        (dict(train=3, test=2, other=1), "o/n", {"train": 3}, {"test": 2}),
        (dict(validation=2, train=3), "o/n", {"train": 3}, {"validation": 2}),
        (dict(train=20), "o/n", {"train": 18}, {"train": 2}),
        (dict(cn=20), "o/n", {"cn": 18}, {"cn": 2}),
        (dict(train=3, test=20), "o/n:test", {"test": 18}, {"test": 2}),
        (dict(train=3, test=2), "o/two", {"train": 3}, {"test": 2}),
        (dict(train=3, test=2), "o/many/b", {"train": 3}, {"test": 2}),
        (dict(train=3, test=20), "o/many/b:test", {"test": 18}, {"test": 2}),
    ],
)
def test_any_set_of_the_hub_is_read_by_its_name(hub, splits, name, train, test):
    made = hub(**splits)
    found = [Counter(p.text.split()[0] for p in split) for split in data.load(name)]
    assert found == [train, test]
    config = "main" if name == "o/two" else "b" if "/b" in name else None
    assert made.asked[-1] == (re.match("o/[a-z]+", name)[0], config)


@pytest.mark.parametrize(
    "splits, name, test",
    [
        (dict(train=3, test=2), "o/n", {"test": 2}),
        (dict(test=12), "o/n", {"test": 12}),
        (dict(train=12), "o/n", {"train": 12}),
        (dict(train=12, test=2), "o/n:train", {"train": 12}),
    ],
)
def test_an_evaluation_takes_what_is_there(hub, splits, name, test, tmp_path):
    hub(**splits)
    train, found = data.load(name, eval_only=True)
    assert len(train) == 0 and Counter(p.text.split()[0] for p in found) == test
    if ":" not in name:
        for split, n in splits.items():
            write(tmp_path / f"{split}.jsonl", ROWS[:n])
        assert len(data.load(tmp_path, eval_only=True)[1]) == sum(test.values())
    train, found = data.load(write(tmp_path / "alone.jsonl", ROWS), eval_only=True)
    assert len(train) == 0 and len(found) == len(ROWS)


@pytest.mark.parametrize(
    "splits, name, message",
    [
        (dict(test=12), "o/n", "has the splits test: name the one to train and to test on, as in o/n:test"),
        (dict(a=1, b=1), "o/n", "has the splits a, b"),
        (dict(train=1), "o/n:tset", "has the splits train"),
        (dict(train=1), "o/many", r"Config name is missing. .*\['a', 'b'\]"),
        (dict(train=1), "o/none", "no such file or folder, nor .* doesn't exist on the Hub"),
        (dict(train=0, test=1), "o/n", "o/n train is empty"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, splits, name, message):
    hub(**splits)
    with pytest.raises(ValueError, match=message) as error:
        data.load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answers", [[2**64 + 1, 5], ["2024-05-01", "2023-01-02"], [1, 0.5]])
def test_answers_that_datasets_changes_when_it_reads_json_are_refused(answers, monkeypatch, tmp_path):
    """The very reader, on a local file; our own reads the file as it is."""
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    path = write(tmp_path / "d.jsonl", rows)
    read = load_dataset("json", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.load_dataset", lambda name, config: read)
    with pytest.raises(
        ValueError, match="o/n train row 1: its answer is .*; it must be text .*datasets changes"
    ):
        data.load("o/n")
    found = data.load(path)
    assert [p.answer for split in found for p in split] == [str(answer) for answer in answers]


def test_a_reward_of_ones_own_needs_no_answer(tmp_path, tokenizer):
    row = {"question": "Write a function.", "tests": ["assert f(1) == 2"], "answer": {"a": 1}}
    path = write(tmp_path / "d.jsonl", [row, row | {"answer": None}])
    train, test = data.load(path, chat=True, answered=False)
    assert [p.answer for p in (*train, *test)] == ["", ""] and train[0].row == row
    assert train[0].prompt == "Write a function."
    for splits in ((train, test), data.load(path, answered=False)):
        assert [len(split) for split in data.encode_splits(splits, tokenizer, SETTINGS, answered=False)] == [
            1,
            1,
        ]
        with pytest.raises(ValueError, match="no response can match 2 of 2 gold answers"):
            data.encode_splits(splits, tokenizer, SETTINGS)
    with pytest.raises(ValueError, match="line 1: its answer is"):
        data.load(path)


def test_a_worked_solution_that_is_no_text_does_not_stop_a_run(tmp_path):
    for solution in (["a", "b"], 5, None, {"steps": []}):
        row = {"problem": "1+1?", "answer": "2", "solution": solution}
        (p,), _ = data.load(write(tmp_path / "d.jsonl", [row, row]))
        assert (p.answer, p.solution) == ("2", "")


def test_long_fields_of_a_csv_are_read(tmp_path):
    rows = [{"problem": "1+1?" + " " * 200_000, "answer": "2"}] * 2
    (p,), _ = data.load(write(tmp_path / "d.csv", rows))
    assert len(p.text) > 200_000


def test_parts_of_a_split_are_read_together(tmp_path):
    for i, rows in enumerate((ROWS[:5], ROWS[5:12])):
        write(tmp_path / f"train-0000{i}-of-00002.parquet", rows)
    write(tmp_path / "test-00000-of-00001.parquet", ROWS[12:])
    train, test = data.load(tmp_path)
    assert [p.answer for p in (*train, *test)] == [row["answer"] for row in ROWS]
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match="exactly one train file"):
        data.load(tmp_path)


def test_problems_are_read_from_disk_in_any_order(tokenizer):
    problems, _ = data.encode(data.load("arithmetic")[1], tokenizer, 100)
    everyone = list(problems)
    assert [problems[i] for i in (7, 0, -1)] == [everyone[i] for i in (7, 0, -1)]
    assert list(problems[3:9:2]) == everyone[3:9:2] and everyone[0].prompt_ids
    with pytest.raises(IndexError):
        problems[len(problems)]


@given(st.lists(st.text(alphabet="ab1 +é½ﷺ字\U0001f600", min_size=1, max_size=12), min_size=1, max_size=6))
def test_prompts_that_fit_are_those_whose_tokens_fit(byte_level, texts):
    """encode counts most of them without tokenizing them."""
    problems = [data.Problem(text, "1", text=text) for text in texts]
    for limit in (3, 8, 20):
        kept, skipped = data.encode(problems, byte_level, limit)
        fit = [text for text in texts if len(byte_level(text)["input_ids"]) <= limit]
        assert [p.prompt for p in kept] == fit and skipped == len(texts) - len(fit)


@pytest.fixture(scope="session")
def byte_level():
    """A tokenizer as Qwen's: NFC, then bytes. Here NFKC, which makes 18 letters of one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["ab ab"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_memory_of_a_large_file(tmp_path, tokenizer):
    """Of each problem a few bytes, where its text alone has 2,000."""
    rows = [{"problem": f"{i}: " + "1+1" * 700, "answer": "2"} for i in range(5000)]
    path = write(tmp_path / "d.jsonl", rows)
    del rows
    tracemalloc.start()
    splits = data.encode_splits(
        data.load(path), tokenizer, SimpleNamespace(**vars(SETTINGS) | dict(max_sequence=5000))
    )
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, splits)) == 5000 and kept < 1e6 and most < 8e6


def test_the_shared_cases_are_read(tokenizer):
    """The field's files, each with twelve small sums."""
    if not SHARED_CASES.is_dir():
        pytest.skip(f"no files at {SHARED_CASES}")
    names = "verl.parquet messages.jsonl lists.jsonl mmlu.jsonl dapo_flat.jsonl orz.json special.jsonl aime"
    for name in names.split():
        _, problems = data.load(SHARED_CASES / name, eval_only=True)
        golds = ["B"] * 12 if name == "mmlu.jsonl" else [str(2 * i + 1) for i in range(12)]
        assert [p.answer for p in problems] == golds
        for i, p in enumerate(problems):
            assert f"What is {i}+{i + 1}?" in p.prompt and p.row
        check_golds(problems, most=0)
    for name in ("arith", "arith_json"):
        train, test = data.load(SHARED_CASES / name)
        assert (len(train), len(test)) == (50, 100) and test[0].answer == "75"
