"""From a prompt to its token ids."""

import json
import re
from datetime import date

from support.model_files import in_one_line

MARKS = [chr(code) for code in range(0xE000, 0xE800)]  # characters of private use: no template holds one


class Encoder:
    """The token ids of prompts, by the tokenizer's own rule for BOS, or inside its chat template.

    chat_options: JSON, variables of the template. day: a date, what the template takes for today. Raises ValueError
    for what the tokenizer does not have.
    """

    def __init__(self, tokenizer, chat=False, chat_options=None, day=None):
        self.tokenizer, self.chat, self.name = tokenizer, chat, tokenizer.name_or_path
        if chat and not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {self.name} has no chat template")
        try:
            self.options = dict(json.loads(chat_options or "{}").items())
        except (ValueError, AttributeError):
            what = 'is no JSON object, as {"enable_thinking": false} is'
            raise ValueError(f"--chat_options {chat_options} {what}") from None
        if self.options and not chat:
            raise ValueError("--chat_options is for the chat template: add --chat")
        for option in self.options:
            if option not in tokenizer.get_chat_template():
                raise ValueError(f"--chat_options: the chat template of {self.name} has no variable {option}")
        self.options["strftime_now"] = (day or date.today()).strftime
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def __call__(self, problems):
        """The ids of each problem's prompt."""
        texts = [self._rendered(self.turns(p), p.prompt) for p in problems]
        found = self.tokenizer(texts, add_special_tokens=not self.chat)[
            "input_ids"
        ]  # a template writes its own BOS
        return [
            self._as_text(p) if self._spells_special(p) else self._continued(ids, text)
            for p, ids, text in zip(problems, found, texts)
        ]

    def turns(self, p):
        """The messages before the prompt."""
        return p.turns if self.chat and p.turns else []

    def _rendered(self, turns, prompt):
        if not self.chat:
            return prompt
        messages = [*turns, {"role": "user", "content": prompt}]
        of = f" for the roles {', '.join(turn['role'] for turn in messages)}" if turns else ""
        with in_one_line(f"--chat: the chat template of {self.name} writes no prompt{of}"):
            options = self.options | dict(add_generation_prompt=True, tokenize=False)
            return self.tokenizer.apply_chat_template(messages, **options)

    def _spells_special(self, p):
        return any(self.special.search(text) for text in [p.text, *(t["content"] for t in self.turns(p))])

    def _as_text(self, p):
        """The ids of a prompt in which a text spells special tokens: as plain text, so that none is obeyed."""
        texts = dict(zip(MARKS, [p.text, *(turn["content"] for turn in self.turns(p))]))
        mark, *marks = texts
        turns = [turn | {"content": m} for turn, m in zip(self.turns(p), marks)]
        rendered = self._rendered(turns, p.prompt.replace(p.text, mark))
        before, *parts = re.split(f"([{MARKS[0]}-{MARKS[-1]}])", rendered)
        ids = self._continued(self.tokenizer(before, add_special_tokens=not self.chat)["input_ids"], before)
        for part in filter(None, parts):
            plain = dict(add_special_tokens=False, split_special_tokens=part in texts)
            ids = ids + self.tokenizer(texts.get(part, part), **plain)["input_ids"]
        return ids

    def _continued(self, ids, text):
        """Without an EOS that the tokenizer appends, and with BOS once."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
