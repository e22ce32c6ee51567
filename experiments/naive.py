"""One VinePPO iteration as a tutorial would write it: correct and simple.

experiments/bench.py compares with it. It has two phases, each one LLM.generate: all responses, then
all states, each sent as often as it occurs. Training pads a minibatch's part to its longest
sequence, runs the head over every position and keeps all logits for backward. One process, one
device, no FSDP; the arithmetic is ppo.py's.
"""

from itertools import islice

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from episode import Episode
from ppo import ppo_loss, whiten
from steps import step_boundaries
from vine import monte_carlo_value, step_advantages, token_advantages


def generate(engine, prompts, n, limits, s):
    """n completions of each prompt, as vLLM returns them. limits: tokens, one for each prompt."""
    options = dict(n=n, temperature=s.temperature, top_p=s.top_p, stop=s.stop)
    params = [SamplingParams(max_tokens=limit, **options) for limit in limits]
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    return [output.outputs for output in engine.llm.generate(prompts, params, use_tqdm=False)]


def text_of(engine, output):
    """What a completion spells, cut off before a stop string."""
    text = engine.decode(list(output.token_ids))
    return text[: min((text.find(s) for s in engine.stop if s in text), default=len(text))]


def rollouts(engine, grader, problems, s):
    """(episodes with advantages, number of sampled tokens). problems: with their prompt_ids."""
    prompts = [p.prompt_ids for p in problems]
    responses = generate(engine, prompts, s.responses_per_prompt, [s.max_tokens] * len(problems), s)
    episodes = []
    for p, outputs in zip(problems, responses):
        for o in outputs:
            ids, text = list(o.token_ids), text_of(engine, o)
            cuts = step_boundaries(s.step_credit, text, ids, engine.decode)
            episodes.append(
                Episode(p.prompt_ids, answer=p.answer, response_ids=ids, text=text, boundaries=cuts)
            )
    right = grader.grade([e.text for e in episodes], [e.answer for e in episodes])

    states = [(e, cut) for e in episodes for cut in e.boundaries[:-1]]
    prompts = [e.prompt_ids + e.response_ids[:cut] for e, cut in states]
    continued = generate(engine, prompts, s.K, [s.max_tokens - cut for _, cut in states], s)
    texts = [text_of(engine, o) for outputs in continued for o in outputs]
    rewards = grader.grade(texts, [e.answer for e, _ in states for _ in range(s.K)])
    values = iter([monte_carlo_value(rewards[i : i + s.K]) for i in range(0, len(rewards), s.K)])
    for e, reward in zip(episodes, map(float, right)):
        e.step_values = list(islice(values, len(e.boundaries) - 1))
        e.advantages = token_advantages(e.boundaries, step_advantages(e.step_values, reward))
    return episodes, sum(len(o.token_ids) for outputs in [*responses, *continued] for o in outputs)


class Trainer:
    """PPO on padded micro-batches of `micro_batch` episodes. model: a folder or hub name."""

    def __init__(
        self, model, device, *, learning_rate, minibatch, micro_batch, epochs=2, dtype=torch.float32
    ):
        self.device, self.dtype = device, dtype
        self.minibatch, self.micro_batch, self.epochs = minibatch, micro_batch, epochs
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)

    def logprobs(self, model, episodes):
        """log pi of the action tokens: [N]. The rows are padded to the longest."""
        longest = max(map(len, episodes))  # L
        rows, masks = [], []
        for e in episodes:
            rows.append(e.prompt_ids + e.response_ids + [0] * (longest - len(e)))
            mask = [False] * (len(e.prompt_ids) - 1) + [True] * len(e.response_ids)
            masks.append(mask + [False] * (longest - len(e)))
        ids = torch.tensor(rows, device=self.device)  # [B, L]
        mask = torch.tensor(masks, device=self.device)  # [B, L - 1]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = model(ids).logits[:, :-1].float()  # [B, L - 1, V]
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask]

    def update(self, episodes):
        """Train on the episodes, in their order."""
        size = self.micro_batch
        parts = [episodes[i : i + size] for i in range(0, len(episodes), size)]
        with torch.no_grad():
            old = [self.logprobs(self.model, part) for part in parts]
            ref = [self.logprobs(self.reference, part) for part in parts]
        advantages = whiten(torch.tensor([a for e in episodes for a in e.advantages], device=self.device))
        advantages = advantages.split([sum(len(e.response_ids) for e in part) for part in parts])
        per_step = self.minibatch // size
        for _ in range(self.epochs):
            for start in range(0, len(parts), per_step):
                chosen = range(start, min(start + per_step, len(parts)))
                num_tokens = sum(len(advantages[i]) for i in chosen)
                for i in chosen:
                    known = old[i], ref[i], advantages[i]
                    logprobs = self.logprobs(self.model, parts[i])
                    loss, _ = ppo_loss(logprobs, *known, self.minibatch, num_tokens)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
