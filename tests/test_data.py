"""Datasets load, templates fill, and every bad file gets one line that says where and what."""

import copy
import json
import re
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoConfig, AutoTokenizer

import data
import train
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
    assert data.load("arithmetic") == (train, test)
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
    assert data.load("worded") == (train, test)
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
    found = [data._gold(row["solution"]) == row["answer"] for row in rows]
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
        ["a.jsonl line 2", "problem or question", "found text, label"],
    ),
    (
        "a.jsonl",
        GOOD + '{"problem": "p", "label": "1"}\n',
        ["a.jsonl line 2", "answer or solution", "found problem, label"],
    ),
    ("a.jsonl", GOOD + '{"problem": "p", "answer": ""}\n', ["a.jsonl line 2", "no gold answer"]),
    ("a.jsonl", GOOD + '{"problem": "p", "solution": "no box"}\n', ["a.jsonl line 2", "no gold answer"]),
    (
        "a.jsonl",
        GOOD * 2 + '{"problem": "p", "solution": ["a"]}\n',
        ["a.jsonl line 3", "solution is no text but list"],
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
    with pytest.raises(
        ValueError, match="--dataset mth is not known: use math, gsm8k, arithmetic, worded, or the path"
    ):
        data.load("mth")
    with pytest.raises(ValueError, match="no such file or folder"):
        data.load(tmp_path / "none.jsonl")
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
    said, settings = [], SimpleNamespace(max_sequence=100, max_tokens=10, chat=False)
    data.encode_splits(data.load(tmp_path), tokenizer, settings, said.append)
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


def test_a_long_field_and_a_solution_that_is_no_text_are_read(tmp_path):
    rows = f"problem,answer,solution\n{'1+1?' * 50_000},2,\n2+2?,4,\n"
    (tmp_path / "d.csv").write_text(rows)
    assert [len(p.text) for split in data.load(tmp_path / "d.csv") for p in split] == [200_000, 4]
    row = dict(problem="1+1?", answer="2", solution=["1+1=2"])
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    assert [(p.answer, p.solution) for split in data.load(tmp_path / "d.jsonl") for p in split] == [
        ("2", "")
    ] * 2
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(row | dict(answer=None))}\n" * 2)
    with pytest.raises(ValueError, match="line 1: its solution is no text but list"):
        data.load(tmp_path / "d.jsonl")


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
]


@pytest.mark.parametrize("gold, expected", GOLDS)
def test_golds_that_no_response_can_match_are_counted_and_named(
    gold, expected, tmp_path, tokenizer, monkeypatch
):
    """No more than the share that is let through; a training run of them alone is refused."""
    rows = ['{"problem": "1+1?", "answer": "2"}', f'{{"problem": "2+2?", "answer": {gold}}}']
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    splits, said = data.load(tmp_path / "d.jsonl"), []
    settings = SimpleNamespace(max_sequence=100, max_tokens=10, chat=False)
    monkeypatch.setattr(data, "MAX_BAD_ANSWERS", 0.5)
    _, (p,) = data.encode_splits(splits, tokenizer, settings, said.append)
    if not said:
        assert p.answer == expected
        return
    assert said[0].startswith("no response can match 1 of 2 gold answers, the first: ")
    assert expected in said[0] and "d.jsonl line 2" in said[0] and "\n" not in said[0]
    monkeypatch.setattr(data, "MAX_BAD_ANSWERS", 0.4)
    with pytest.raises(ValueError, match="at most 40% of them"):
        data.encode_splits(splits, tokenizer, settings)


@pytest.mark.parametrize("gold", ['{"value": 72}', "[72]", "NaN", "Infinity"])
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


def test_the_golds_of_gsm8k_and_math_are_all_right(shared_data, tokenizer):
    for name in ("gsm8k", "math"):
        problems = [p for split in data.load(shared_data / name) for p in split]
        data.check_golds(problems, 0)


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
