"""docs/walkthrough.md against the code that it explains."""

import re

import pytest

from episode import Episode, State
from experiments import walkthrough
from steps import split_steps

PAGE = walkthrough.PAGE.read_text()


def test_every_link_names_the_line_of_its_function():
    """After a change: python experiments/walkthrough.py --links"""
    assert len(re.findall(r"\.py#L\d+", PAGE)) > 15
    assert walkthrough.relinked(PAGE) == PAGE
    assert walkthrough.relinked(PAGE.replace("#L", "#L1")) == PAGE


def test_the_text_of_the_page_is_that_of_the_program():
    """But for what the run fills in."""
    parts = re.split(r"\{(?:\w+(?:\.\w+|\[[\w.:]+\])?(?::\w+)?)\}", walkthrough.TEXT)
    page, position = " ".join(PAGE.split()), 0
    for part in parts:
        words = " ".join(part.replace("{{", "{").replace("}}", "}").split())
        assert (position := page.find(words, position)) >= 0, words


def test_the_values_of_the_page_make_its_advantages():
    rows = re.findall(r"\| (\d)/9 \| (?:(\d)/9|R = (\d)) \| ([-+]\d)/9 = ([-+]\d\.\d\d) ± ", PAGE)
    assert len(rows) > 6
    for before, after, reward, ninths, advantage in rows:
        assert int(after or 9 * int(reward)) - int(before) == int(ninths)
        assert float(advantage) == pytest.approx(int(ninths) / 9, abs=0.0051)
    for ours, hand in re.findall(r"\| ([-+]?\d\.\d{5}) \| ([-+]?\d\.\d{5}) \|", PAGE):
        assert float(ours) == pytest.approx(float(hand), abs=2e-5)


def test_the_section_about_latex_is_what_the_rules_make_of_it():
    assert walkthrough.latex().strip() in PAGE
    parts = walkthrough.across_a_cut()
    assert parts["tokens"].strip() in PAGE and parts["spanning"] == ".⏎The"
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
