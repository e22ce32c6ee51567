"""One VinePPO iteration as a tutorial would write it, for experiments/bench.py to compare with: nothing wrong, nothing clever.

Two phases, each one LLM.generate: all responses, then all states, each sent as often as it occurs. Training pads a minibatch's part to its longest
sequence, runs the head over every position and keeps all logits for backward. One process, one device, no FSDP; the arithmetic is ppo.py's.
"""

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

import ppo
import vine
from baselines import credit


def sample(llm, prompts, n, limits, s):
    params = [SamplingParams(n=n, max_tokens=limit, temperature=s.temperature, top_p=s.top_p, stop=s.stop) for limit in limits]
    return [output.outputs for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)]


def rollouts(engine, grader, batch, s):
    """Episodes with advantages, in two phases; and the number of sampled tokens."""
    grade = lambda outputs, answers: grader.grade([engine.text(list(o.token_ids)) for o in outputs], answers)
    groups = sample(engine.llm, [ids for _, ids in batch], s.responses_per_prompt, [s.max_tokens] * len(batch), s)
    episodes = [
        dict(prompt_ids=ids, answer=problem.answer, response_ids=list(o.token_ids), text=engine.text(list(o.token_ids)))
        for (problem, ids), group in zip(batch, groups)
        for o in group
    ]
    rewards = grade([o for group in groups for o in group], [e["answer"] for e in episodes])
    states = []
    for e in episodes:
        e["boundaries"] = credit.token_boundaries(s.step_credit, e["text"], e["response_ids"], engine.decode)
        states += [(e, cut) for cut in e["boundaries"][:-1]]
    prompts = [e["prompt_ids"] + e["response_ids"][:cut] for e, cut in states]
    continued = sample(engine.llm, prompts, s.K, [s.max_tokens - cut for _, cut in states], s)
    right = grade([o for group in continued for o in group], [e["answer"] for e, _ in states for _ in range(s.K)])
    values = iter(vine.monte_carlo_values([right[i : i + s.K] for i in range(0, len(right), s.K)]))
    for e, reward in zip(episodes, rewards):
        of_states = [next(values) for _ in e["boundaries"][:-1]]
        e["advantages"] = vine.token_advantages(e["boundaries"], vine.step_advantages(of_states, float(reward)))
    return episodes, sum(len(o.token_ids) for group in [*groups, *continued] for o in group)


class Trainer:
    def __init__(
        self, model, device, *, learning_rate, minibatch, micro_batch, epochs=2, dtype=torch.float32, checkpoint_activations=False
    ):
        self.device, self.minibatch, self.micro_batch, self.epochs, self.dtype = device, minibatch, micro_batch, epochs, dtype
        self.model, self.reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device) for _ in range(2))
        if checkpoint_activations:
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=0.0)

    def logprobs(self, model, episodes):
        """Of the action tokens, [N]; the rows are padded to the longest."""
        sequences = [e["prompt_ids"] + e["response_ids"] for e in episodes]
        longest = max(map(len, sequences))
        ids = torch.tensor([x + [0] * (longest - len(x)) for x in sequences], device=self.device)
        masks = [[False] * (len(e["prompt_ids"]) - 1) + [True] * len(e["response_ids"]) + [False] * longest for e in episodes]
        mask = torch.tensor([m[: longest - 1] for m in masks], device=self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = model(ids).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask]

    def update(self, episodes):
        parts = [episodes[i : i + self.micro_batch] for i in range(0, len(episodes), self.micro_batch)]
        with torch.no_grad():
            known = [(self.logprobs(self.model, part), self.logprobs(self.reference, part)) for part in parts]
        advantages = ppo.whiten(torch.tensor([a for e in episodes for a in e["advantages"]], device=self.device))
        advantages = advantages.split([sum(len(e["response_ids"]) for e in part) for part in parts])
        per_step = self.minibatch // self.micro_batch
        for _ in range(self.epochs):
            for start in range(0, len(parts), per_step):
                chosen = range(start, min(start + per_step, len(parts)))
                num_tokens = sum(len(advantages[i]) for i in chosen)
                for i in chosen:
                    loss, _ = ppo.ppo_loss(self.logprobs(self.model, parts[i]), *known[i], advantages[i], self.minibatch, num_tokens)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
