"""VinePPO (arXiv 2410.01679) in one file: one process on one device, a CPU or a GPU.

    python sft.py --dataset arithmetic --out runs/sft    # a tiny policy that makes slips
    python simple.py                                     # trains it, on a CPU in minutes
    python simple.py --dataset mine.jsonl --model MODEL --learning_rate 1e-6 --max_sequence 1024

PPO predicts the value of a state with a network. Here a state is a text, which can be continued, so
VinePPO measures its value. What is kept from the paper, numbered as in the code:
1. The reward R of a response is 1 if it is finished and its final answer is right, else 0.
2. A response is cut into steps. The state s_t is the prompt and the first t steps.
3. V(s_t) = 1/K sum_k R(tau_k): the mean reward of K rollouts that the policy samples from s_t.
4. A_t = V(s_{t+1}) - V(s_t), and R - V(s_{T-1}) for the last step. Each token of step t gets A_t.
5. PPO: whitened advantages, clipped ratio, two epochs, a small KL penalty to the initial policy.
Left out here; train.py has it:
6. Several GPUs, batches without padding, rollouts that begin while responses are being sampled.
7. Checkpoints, metrics, checks, skipped steps; PPO's network, GRPO, RLOO; averages of values.
"""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # on a GPU it would need a compiler
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else a busy machine slows it several times

import random
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from vllm import LLM, SamplingParams

import data
from grader import Grader
from steps import step_boundaries

# on a GPU the engine and the products in training are bfloat16; the weights that train are float32
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@dataclass
class Settings:  # of `make demo`; the paper's for Rho-1B on MATH where they differ
    model: str = "runs/sft"  # Hugging Face folder or hub name; paper: realtreetune/rho-1b-sft-MATH
    dataset: str = "arithmetic"  # worded, gsm8k, math, or the path of your own (see data.py)
    chat: bool = False  # put the prompt into the tokenizer's chat template
    out: str = "runs/simple"  # folder that the trained policy is saved to
    seed: int = 0
    iterations: int = 80  # paper: 1000
    prompts_per_iteration: int = 32  # paper: 64
    responses_per_prompt: int = 2  # paper: 8
    K: int = 4  # rollouts from each state; paper: 9
    temperature: float = 1.0  # paper: 0.6
    top_p: float = 1.0  # paper: 0.9
    max_tokens: int = 128  # of a response; a rollout gets what its prefix left; paper: 1024
    max_sequence: int = 160  # tokens of prompt and response together; paper: 2048
    stop: str = "\n\n\nProblem:"  # ends a response, as EOS does
    learning_rate: float = 1e-4  # about 3 % warm-up, linear decay; paper: 1e-6
    minibatch: int = 32  # responses per optimizer step; paper: 64
    micro_batch: int = 8  # responses per forward pass: memory and speed, not the result
    epochs: int = 2
    clip: float = 0.2
    kl_coef: float = 1e-4
    eval_every: int = 20  # iterations
    memory: float = 0.2  # the engine's share of the device's memory


@dataclass
class Rollout:  # what the policy sampled from a state (prompt, prefix, answer)
    prompt: tuple  # token ids
    prefix: tuple  # token ids of the first t steps, as they were sampled; a response has none
    answer: str  # gold
    ids: tuple  # [N], token ids, EOS included
    text: str  # of prefix and ids, without EOS and stop string
    reward: float  # R
    steps: list = None  # [T + 1], where steps begin, and N; of responses alone, as all below
    states: list = None  # [T], before each step
    advantages: torch.Tensor = None  # [N]
    old_logprobs: torch.Tensor = None  # [N]
    ref_logprobs: torch.Tensor = None  # [N]


def sample(llm, grader, states, n, s):
    """n rollouts from each state, one state after the other: [len(states) * n]."""
    how = partial(SamplingParams, n=n, temperature=s.temperature, top_p=s.top_p, stop=s.stop)
    params = [how(max_tokens=s.max_tokens - len(prefix)) for _, prefix, _ in states]
    prompts = [{"prompt_token_ids": [*prompt, *prefix]} for prompt, prefix, _ in states]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    decode, rollouts = partial(llm.get_tokenizer().decode, skip_special_tokens=True), []
    for (prompt, prefix, answer), output in zip(states, outputs):
        for o in output.outputs:
            text, stop, _ = decode([*prefix, *o.token_ids]).partition(s.stop)
            finished = o.finish_reason == "stop" or stop  # by EOS or the stop string, not the limit
            R = float(bool(finished and grader.grade([text], [answer])[0]))
            rollouts.append(Rollout(prompt, prefix, answer, tuple(o.token_ids), text, R))
    return rollouts


def collect(llm, grader, starts, s):
    """Responses from the states s_0, with the advantages of their tokens."""
    responses = sample(llm, grader, starts, s.responses_per_prompt, s)  # 1.
    # 2. steps, and the states before them
    decode = partial(llm.get_tokenizer().decode, skip_special_tokens=True)
    for r in responses:
        r.steps = step_boundaries("paper", r.text, r.ids, decode)
        r.states = [(r.prompt, r.ids[:start], r.answer) for start in r.steps[:-1]]
    # 3. V(s) = 1/K sum_k R(tau_k) of each distinct state
    V = dict.fromkeys((state for r in responses for state in r.states), 0.0)
    for tau in sample(llm, grader, list(V), s.K, s):
        V[tau.prompt, tau.prefix, tau.answer] += tau.reward / s.K
    # 4. A_t = V(s_{t+1}) - V(s_t), and R - V(s_{T-1}) for the last step
    for r in responses:
        values = [*(V[state] for state in r.states), r.reward]  # [T + 1]
        A = [after - before for before, after in zip(values, values[1:])]  # [T]
        r.advantages = torch.tensor(A).repeat_interleave(torch.tensor(r.steps).diff())  # [N]
    return responses


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def logprobs(model, responses, s):
    """log pi of the tokens of each response, at the sampling temperature: a list of tensors [N]."""
    rows = [torch.tensor(r.prompt + r.ids) for r in responses]
    ids = pad_sequence(rows, batch_first=True).to(device)  # [B, L]; no token sees those after it
    with torch.autocast(device, dtype, enabled=device == "cuda"):
        logits = model(ids, use_cache=False).logits.float() / s.temperature  # [B, L, V]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # [B, L - 1]
    return [row[len(r.prompt) - 1 :][: len(r.ids)] for row, r in zip(logp, responses)]


def ppo_loss(logp, r, num_tokens, num_responses, s):
    """What response r adds to the loss of a minibatch of so many tokens and responses."""
    A, rho = r.advantages, (logp - r.old_logprobs).exp()  # [N]; rho = pi / pi_old
    policy = torch.maximum(-A * rho, -A * rho.clamp(1 - s.clip, 1 + s.clip))  # [N]
    d = r.ref_logprobs - logp  # [N], log pi_ref - log pi
    kl = (d.exp() - d - 1).clamp(0, 10)  # [N], k3, an estimate of KL(pi, pi_ref)
    return policy.sum() / num_tokens + s.kl_coef * kl.sum() / num_responses


def update(policy, reference, optimizer, responses, s):
    """5. PPO on an iteration's responses."""
    A = torch.cat([r.advantages for r in responses]).double()  # [all tokens]
    for part in chunks(responses, s.micro_batch):
        with torch.no_grad():
            old, ref = logprobs(policy, part, s), logprobs(reference, part, s)
        for i, r in enumerate(part):
            r.old_logprobs, r.ref_logprobs = old[i], ref[i]
            r.advantages = ((r.advantages - A.mean()) / A.std().clamp(min=1e-8)).to(device)
    for _ in range(s.epochs):
        for minibatch in chunks(random.sample(responses, len(responses)), s.minibatch):
            size = sum(len(r.ids) for r in minibatch), len(minibatch)
            for part in chunks(minibatch, s.micro_batch):  # whose gradients add up
                new = logprobs(policy, part, s)
                sum(ppo_loss(logp, r, *size, s) for logp, r in zip(new, part)).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    (s,) = transformers.HfArgumentParser(Settings).parse_args_into_dataclasses()
    try:
        for name, value in vars(s).items():
            if name not in ("chat", "seed", "kl_coef") and not value > type(value)():  # 0 or ""
                raise ValueError(f"--{name} {value!r} must be above {type(value)()!r}")
        if s.model.startswith("runs/") and not os.path.isdir(s.model):
            raise ValueError(f"--model {s.model} is not there: make it with sft.py")
        tokenizer = transformers.AutoTokenizer.from_pretrained(s.model)
        room, splits = s.max_sequence - s.max_tokens, data.load(s.dataset, chat=s.chat)
        encoded = [data.encode(problems, tokenizer, room, s.chat)[0] for problems in splits]
        if not all(encoded):
            raise ValueError(f"every prompt is longer than --max_sequence - --max_tokens = {room}")
        starts, held_out = ([(tuple(p.prompt_ids), (), p.answer) for p in x] for x in encoded)
        # only whole blocks of a prefix are cached: of 32 tokens
        how = dict(max_model_len=s.max_sequence, gpu_memory_utilization=s.memory, block_size=32)
        llm, grader = LLM(s.model, dtype=dtype, enforce_eager=device == "cpu", **how), Grader()
    except (ValueError, OSError) as error:
        raise SystemExit("simple.py: " + " ".join(str(error).split())) from None
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(s.model, dtype=torch.float32).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=s.learning_rate, weight_decay=0.0)
    transformers.set_seed(s.seed)
    for i in range(s.iterations + 1):
        if i > 0:
            warm_up, decay = i / (0.03 * s.iterations), 1 - (i - 1) / s.iterations
            optimizer.param_groups[0]["lr"] = s.learning_rate * min(warm_up, decay)
            responses = collect(llm, grader, random.choices(starts, k=s.prompts_per_iteration), s)
            update(policy, reference, optimizer, responses, s)
            llm.collective_rpc("reload_weights", args=(policy.state_dict().items(),))
            assert llm.reset_prefix_cache()  # what it holds is the old policy's
            print(f"iteration {i}: reward {mean(r.reward for r in responses):.3f}", flush=True)
        if i % s.eval_every == 0 or i == s.iterations:
            found = sample(llm, grader, held_out, s.responses_per_prompt, s)
            print(f"iteration {i}: accuracy {mean(r.reward for r in found):.3f}", flush=True)
    policy.save_pretrained(s.out)
    tokenizer.save_pretrained(s.out)
