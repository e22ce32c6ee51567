"""The second built-in task: a stock is followed through the months of a year, in free wording.

Most tokens of a solution do not matter for its reward, as in language: each line tells its operation in words
drawn from many equally good ones. The demonstrator is as careless as in arithmetic.py, and this task is not
evidence about language models either. experiments/README.md says how its wording and length were chosen.
"""

import random

from tasks.tiny_model import write_model

MONTHS = "January February March April May June July August September October November December".split()
OPENINGS = """early late soon finally luckily meanwhile later again once suddenly eventually busily
    next today oddly surely""".split()
ARTICLES = "the our my their his her one another".split()
PEOPLE = """clerk keeper porter owner helper trader farmer baker driver carter sailor miller partner
    cousin neighbour master""".split()
MANNERS = """gladly calmly neatly quickly slowly kindly bravely boldly firmly gently proudly quietly
    swiftly warmly wisely safely""".split()
ADDED = "stored added stacked bought fetched loaded received gathered".split()
TAKEN = "sold shipped lent gave lost removed spent returned".split()
LOOKS = """fresh heavy light green brown plain wooden broken painted dusty shiny solid narrow wide
    cheap fine""".split()
THINGS = """crates boxes chests barrels baskets sacks bags bundles parcels cases jars tins bottles
    cans tubs packets""".split()
LINKS = "so thus and then hence therefore whereby which".split()
BECAME = "became turned made gave left changed went moved".split()


def rows(num_train, num_test, seed=0, slip=0.12, steps=12):
    """Rows of the task, train and test disjoint: (where, {problem, answer, solution}) each.

    Problem: "84 crates, January +4 February -9 ..?". Solution: a line for each of the first `steps` months,
    "January +4: soon his helper bought painted jars quickly, so 84 became 88", then "#### 75".

    The stock stays between 20 and 99. On a carry the demonstrator forgets the ten, on a borrow he takes it
    twice, each with the probability slip. So errors only lose tens, and no error repairs another. The answer
    column always holds the true value.
    """
    rng, found, seen = random.Random(seed), [], set()
    while len(found) < num_train + num_test:
        start = value = rng.randint(20, 99)
        changes = []
        for _ in range(steps):
            changes.append(rng.choice([n for n in range(-9, 10) if n and 20 <= value + n < 100]))
            value += changes[-1]
        told = " ".join(f"{month} {change:+d}" for month, change in zip(MONTHS, changes))
        problem = f"{start} crates, {told}?"
        if problem not in seen:
            seen.add(problem)
            solution = _demonstrate(start, changes, slip, rng)
            found.append({"problem": problem, "answer": str(value), "solution": solution})
    numbered = [(f"worded problem {i}", row) for i, row in enumerate(found)]
    return numbered[:num_train], numbered[num_train:]


def _demonstrate(value, changes, slip, rng):
    """The careless demonstrator's lines."""
    lines = []
    for month, change in zip(MONTHS, changes):
        carries = not 0 <= value % 10 + change < 10
        lost = 10 if carries and rng.random() < slip else 0
        result = max(0, value + change - lost)  # no stock is below 0
        lines.append(_line(month, change, value, result, rng.choice))
        value = result
    return "\n".join([*lines, f"#### {value}"])


def _line(month, change, value, result, pick):
    who, verb = f"{pick(ARTICLES)} {pick(PEOPLE)}", pick(ADDED if change > 0 else TAKEN)
    what, manner = f"{pick(LOOKS)} {pick(THINGS)}", pick(MANNERS)
    told = pick([f"{who} {manner} {verb} {what}", f"{who} {verb} {what} {manner}"])
    return f"{month} {change:+d}: {pick(OPENINGS)} {told}, {pick(LINKS)} {value} {pick(BECAME)} {result}"


def tiny_model(folder, seed):
    """Write a Llama of about 0.5M parameters, and a tokenizer.

    A word, a digit or a change such as +4 is a token, with the space before it.
    """
    lists = MONTHS, ARTICLES, PEOPLE, MANNERS, ADDED, TAKEN, LOOKS, THINGS, OPENINGS, LINKS, BECAME
    after_space = [word for words in lists for word in words]
    after_space += [f"{change:+d}" for change in range(-9, 10) if change]
    tokens = [*"0123456789\n,:?", "####", *MONTHS, *(f" {word}" for word in [*after_space, *"0123456789"])]
    pattern = r"\n|[,:?]| [+-]\d| ?\d| ?[^\s\d,:?]+"
    sizes = dict(num_hidden_layers=2, max_position_embeddings=320)
    write_model(folder, seed, dict.fromkeys(tokens), pattern, **sizes)
