"""The first built-in task, to see the method work within minutes: chains of arithmetic, and a tiny model.

The headroom for RL is made on purpose: a careless demonstrator worked the solutions, so a policy tuned on
them fails at particular steps. The task is not evidence about language models.
"""

import random

from tasks.tiny_model import write_model


def rows(num_train, num_test, seed=0, slip=(0.15, 0.15, 0.55)):
    """Rows of the task, train and test disjoint: problem "8*9+6-7+5+1?", a line per operation, "#### 77".

    The chains have 5 to 9 operations, worked from left to right on numbers below 100. The demonstrator
    forgets a carry in an addition, a borrow in a subtraction and the carry in a two-digit product, with the
    probabilities slip, and continues from the wrong number. The answer column always holds the true value.
    """
    rng, found, seen = random.Random(seed), [], set()
    while len(found) < num_train + num_test:
        value, chain = rng.randint(1, 9), []
        expression = str(value)
        for _ in range(rng.randint(5, 9)):
            moves = [
                (op, d)
                for op in "+-*"
                for d in range(2 if op == "*" else 1, 10)
                if 0 <= _apply(value, op, d) < 100
            ]
            op = rng.choice(sorted({op for op, _ in moves}))
            digit = rng.choice([d for o, d in moves if o == op])
            value = _apply(value, op, digit)
            chain.append((op, digit))
            expression += f"{op}{digit}"
        if expression not in seen:
            seen.add(expression)
            solution = _demonstrate(int(expression[0]), chain, slip, rng)
            found.append({"problem": expression + "?", "answer": str(value), "solution": solution})
    numbered = [(f"arithmetic problem {i}", row) for i, row in enumerate(found)]
    return numbered[:num_train], numbered[num_train:]


def _apply(value, op, digit):
    return value + digit if op == "+" else value - digit if op == "-" else value * digit


def _demonstrate(value, chain, slip, rng):
    """The careless demonstrator's lines. slip: probabilities of forgetting a carry or borrow in +, -, *."""
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


def tiny_model(folder, seed):
    """Write a Llama of about 0.4M parameters, and a tokenizer with one token per character."""
    write_model(folder, seed, "0123456789+-*=?#\n ", r"[\s\S]", num_hidden_layers=2)
