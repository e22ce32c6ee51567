"""Other ways to cut a response into the steps that VinePPO gives credit to, for comparison with the paper's (vine.split_steps)."""

import re

import vine

NEWLINE = re.compile(r"\n\s*(?=\S)")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def check(rule):
    """Raise ValueError if rule is none of paper, newline, sentence, tokens:N."""
    if rule not in ("paper", "newline", "sentence") and not re.fullmatch(r"tokens:[1-9]\d*", rule):
        raise ValueError(f"--step_credit {rule} is not known: use paper, newline, sentence, or tokens:N as in tokens:100")


def token_boundaries(rule, text, token_ids, decode):
    """Token boundaries of the steps of a response, strictly increasing from 0 to len(token_ids).

    rule: "paper"; "newline", each line a step; "sentence", cut only after a full stop before a capital letter; "tokens:100", chunks of 100
    tokens. text: what the token ids spell; decode: token ids -> text.
    """
    if rule.startswith("tokens:"):
        return [*range(0, len(token_ids), int(rule.split(":")[1])), *([len(token_ids)] if token_ids else [])] or [0]
    if rule == "paper":
        cuts = vine.split_steps(text)
    else:
        places = {m.start() for m in (NEWLINE if rule == "newline" else SENTENCE).finditer(text)} - {0, len(text)}
        cuts = [0, *sorted(places), *([len(text)] if text else [])]
    return vine.token_boundaries(cuts, vine.token_starts(token_ids, decode))
