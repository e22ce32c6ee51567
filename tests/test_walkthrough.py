"""docs/walkthrough.md: its marked places, what its sentences say of the tables, and the program that fills them.

The numbers belong to a machine; `python experiments/walkthrough.py --check` compares them there.
"""

import re
import statistics
from types import SimpleNamespace

import pytest

import train
from episode import Episode, State
from experiments import walkthrough
from steps import split_steps

PAGE = walkthrough.PAGE.read_text()
PLACES = walkthrough.places(PAGE)


def rows(name):
    """The cells of the tables in a place, without heads."""
    lines = [line for line in PLACES[name].splitlines() if line.startswith("|")]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|-")]
    cells = [re.split(r" (?<!\\)\| ", line.strip("| ") + " ") for line in lines]
    return [
        [cell.strip() for cell in c] for i, c in enumerate(cells) if i not in rules and i + 1 not in rules
    ]


def test_every_link_names_the_line_of_its_function():
    """After a change: python experiments/walkthrough.py --links"""
    assert len(re.findall(r"\.py#L\d+", PAGE)) > 15
    assert walkthrough.relinked(PAGE) == PAGE
    assert walkthrough.relinked(PAGE.replace("#L", "#L1")) == PAGE


def test_the_marks_come_in_pairs_and_no_mark_in_a_sentence_begins_a_line():
    """One that does would begin a block of HTML, and end the paragraph."""
    names = re.findall(r"<!-- (\w+) -->", PAGE)
    assert names == [*PLACES] == re.findall(r"<!-- /(\w+) -->", PAGE) and len(names) > 20
    assert PAGE.count("<!--") == 2 * len(names)
    for line in PAGE.splitlines():
        assert not line.startswith("<!--") or re.fullmatch(r"<!-- /?\w+ -->", line), line


def test_the_program_fills_the_marked_places_alone():
    text = "It has <!-- a -->1<!-- /a --> and\n<!-- b -->\n```\n2\n```\n<!-- /b -->\nend"
    found = walkthrough.filled(text, {"a": r"\1", "b": "x\ny"})
    assert found == "It has <!-- a -->\\1<!-- /a --> and\n<!-- b -->\nx\ny\n<!-- /b -->\nend"
    assert walkthrough.places(found) == {"a": r"\1", "b": "x\ny"}
    assert walkthrough.filled(PAGE, PLACES) == PAGE


def test_a_check_names_the_places_that_differ_and_writes_nothing(tmp_path, capsys):
    path = tmp_path / "page.md"
    text = "<!-- a -->1<!-- /a -->, <!-- b -->2<!-- /b --> [vine.Vine](../vine.py#L0)"
    check, fill = (SimpleNamespace(page=path, check=check) for check in (True, False))

    def finish(how, found):
        path.write_text(text)
        code = walkthrough.finish(how, text, found)
        return code, capsys.readouterr().err, path.read_text() == text

    assert finish(check, dict(a="1", b="3")) == (1, f"walkthrough.py: {path} differs in b, links\n", True)
    odd = f"walkthrough.py: only one of {path} and this program has b, c\n"
    assert finish(check, dict(a="1", c="3")) == finish(fill, dict(a="1", c="3")) == (1, odd, True)
    assert finish(fill, dict(a="1", b="3")) == (0, "", False)
    assert walkthrough.finish(check, path.read_text(), dict(a="1", b="3")) == 0


def test_the_sentences_say_what_the_tables_say():
    """Each place inside of a sentence, against the blocks and the settings."""
    values, whitened, five = rows("values"), rows("whitened"), rows("five")
    assert all(row[1].endswith(f"/{PLACES['K']}") for row in values)
    states = re.findall(r"\bs_\d", PLACES["states"])
    assert PLACES["count"] == f"{len(states)} states for {len(rows('steps'))} steps" and len(states) > 5
    advantages = [float(a) for _, _, tokens, a, *_ in whitened for _ in range(int(tokens))]
    count, mean, deviation = re.fullmatch(r"(\d+) tokens, mean (.+), .* (.+)", PLACES["moments"]).groups()
    assert int(count) == len(advantages)
    assert float(mean) == pytest.approx(statistics.mean(advantages), abs=5e-5)
    assert float(deviation) == pytest.approx(statistics.stdev(advantages), abs=5e-5)
    s = train.parse_settings(["--dataset", "arithmetic"])
    assert (float(PLACES["rate"]), float(PLACES["kl_coef"])) == (s.learning_rate, s.kl_coef)
    assert f"samples responses at temperature {s.temperature:g} " in PAGE and len(five) == 5
    wrong = values[len(values) // 2 :]
    falls = [float(re.search(r"= (\S+) ±", row[3])[1]) for row in wrong]
    assert wrong[falls.index(min(falls))][0] == PLACES["fallen"]
    first = rows("blame")[0]
    # the blamed token, if it is among the five, is there with the same log-probabilities
    same = [row for row in five if row[0].startswith("wrong") and row[0].endswith(PLACES["unsure"])]
    assert PLACES["unsure"].strip("`") in PLACES["fallen"]
    assert any(row[1:3] == first[1:3] for row in same) or not same


def test_the_values_of_the_page_make_its_advantages():
    found = rows("values")
    assert len(found) > 6
    for _, before, after, advantage in found:
        ninths = re.fullmatch(r"(\d)/9", after) or re.fullmatch(r"R = (\d)", after)
        change = int(ninths[1]) * (9 if after.startswith("R") else 1) - int(before[0])
        told, rounded = re.match(r"([-+]\d)/9 = (\S+) ± ", advantage).groups()
        assert int(told) == change and float(rounded) == pytest.approx(change / 9, abs=0.0051)
    pairs = [row[-2:] for row in rows("whitened") + rows("together")]
    assert len(pairs) > 10
    for by_function, by_formula in pairs:
        assert float(by_function) == pytest.approx(float(by_formula), abs=2e-5)


def test_the_section_about_latex_is_what_the_rules_make_of_it():
    for name, text in walkthrough.about_latex().items():
        assert PLACES[name] == text, name
    assert PLACES["spanning"] == "`.⏎The`"
    cuts = split_steps(walkthrough.SOLUTION)
    rules = {walkthrough.rule_of(walkthrough.SOLUTION, cut).split(":")[0] for cut in cuts[:-1]}
    assert len(rules) == 5


def test_equal_states_are_one_in_the_tree():
    texts = {1: "a", 2: "b", 3: "x", 4: "c"}
    shared = [State([0], []), State([0], [1]), State([0], [1, 2])]
    right = Episode([0], response_ids=[1, 2, 4], boundaries=[0, 1, 2, 3], states=shared)
    wrong = Episode(
        [0], response_ids=[1, 3, 4], boundaries=[0, 1, 2, 3], states=[*shared[:2], State([0], [1, 3])]
    )
    lines = walkthrough.tree(right, wrong, lambda ids: "".join(texts[i] for i in ids))
    assert [line.split() for line in lines[1:]] == [
        ["└", "a", "s_1", "of", "both"],
        ["├", "b", "s_2", "of", "the", "right", "one"],
        ["└", "x", "s_2", "of", "the", "wrong", "one"],
    ]
