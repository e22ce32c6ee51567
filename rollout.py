"""The engine: one vLLM inside each rank's process. It samples, takes the trainer's weights, and sleeps while the GPU trains.

The only file that imports vLLM. Join the process group first (ppo.init_distributed), then make the Engine, then the trainer's models.
"""

import os
import warnings
from dataclasses import dataclass

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process; read when vLLM is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report home
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB per rank; without a GPU only

import numpy as np
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    torch._dynamo.config.disable = True  # vLLM would compile its sampling helpers for 20 s
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind


@dataclass
class Completion:
    token_ids: list[int]  # as sampled: ends with EOS if it was sampled; the tokens of a stop string stay, they are actions like any other
    finished: bool  # ended by itself (EOS or a stop string), not by its token limit
    logprobs: list[float] | None  # of each token at temperature 1, before top-p; None unless asked for


class Engine:
    """vLLM with prefix caching, for token ids in and token ids out.

    model: Hugging Face folder or hub name; max_sequence: tokens of the longest prompt and response together; stop: strings that end a response.
    gpu_memory: share of a GPU for weights and KV cache. max_sequences: how many may run at a time; None: vLLM's default. tensor_parallel: so many consecutive ranks
    share one model; they must be given the same requests in the same order, and get the same completions. Of `groups` such groups this
    rank is in number `group`, and in each one rank `leads`. on_step is called before each step of the engine; it may raise to give its work up.
    """

    def __init__(
        self, model, *, max_sequence, stop=(), bfloat16=None, gpu_memory=0.6, max_sequences=None, tensor_parallel=1, trust_remote_code=False,
        on_step=lambda: None,
    ):  # fmt: skip
        self.on_gpu, self.stop, self.asleep, self.on_step = torch.cuda.is_available(), list(stop), False, on_step
        self.group, self.groups = dist.get_rank() // tensor_parallel, dist.get_world_size() // tensor_parallel
        self.leads = dist.get_rank() % tensor_parallel == 0
        self.running, self.submitted, self.steps = {}, 0, 0  # running: number of a request -> (its key, n)
        self.aborted = 0  # completions that the engine gave up; they count as unfinished
        bfloat16 = self.on_gpu if bfloat16 is None else bfloat16
        self.llm = LLM(
            model,
            dtype="bfloat16" if bfloat16 else "float32",
            distributed_executor_backend="external_launcher",  # use torchrun's ranks and process group
            tensor_parallel_size=tensor_parallel,
            load_format="safetensors",
            trust_remote_code=trust_remote_code,
            max_model_len=max_sequence,
            max_num_seqs=max_sequences,
            enable_prefix_caching=True,
            block_size=16 if self.on_gpu else 32,  # tokens; only whole blocks of a prefix are cached
            gpu_memory_utilization=gpu_memory,
            enable_sleep_mode=self.on_gpu,
            enforce_eager=not self.on_gpu,
            use_tqdm_on_load=False,
            disable_log_stats=False,  # counts the prefix cache's hits
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.max_sequences = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs

    def seed(self, *numbers):
        """What is sampled from here on depends on these integers, the weights and the rank's group alone: not on what was sampled before."""
        number = hash((*numbers, self.group))
        torch.manual_seed(number % 2**63)  # vLLM draws from the global generators: torch's, or on GPUs for top_p = 1 numpy's
        np.random.seed(number % 2**32)
        self._forget_prefixes()  # a cached prefix differs from one computed anew in the last bit

    def submit(self, key, prompt, n, max_tokens, temperature, top_p=1.0, logprobs=False):
        """Queue n completions of a list of token ids; step() delivers them under `key`. They may be submitted while others are written."""
        params = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=self.stop or None, detokenize=bool(self.stop),
            logprobs=0 if logprobs else None,  # 0: that of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        number = str(self.submitted)
        self.submitted += 1
        self.running[number] = key, n
        self.llm.llm_engine.add_request(number, {"prompt_token_ids": prompt}, params)

    def has_room(self):
        """Whether fewer than max_sequences are in the engine, running or waiting there for a place in the KV cache."""
        return self.llm.llm_engine.get_num_unfinished_requests() < self.max_sequences

    def step(self):
        """One step of the engine, which adds a token to each sequence it works at: [(key, n Completions)] of the requests that end with it."""
        self.on_step()
        self.steps += 1
        ended = {output.request_id: [self._completion(c) for c in output.outputs] for output in self.llm.llm_engine.step()}
        if not ended and not self.llm.llm_engine.has_unfinished_requests():
            ended = {number: [] for number in self.running}  # it gave these up without a word
        done = []
        for number, completions in ended.items():
            key, n = self.running.pop(number)
            self.aborted += n - len(completions)
            done.append((key, completions + [Completion([], False, None)] * (n - len(completions))))
        return done

    def generate(self, prompts, n, max_tokens, temperature, top_p=1.0, logprobs=False):
        """Sample n completions for each prompt.

        prompts: lists of token ids; max_tokens: one limit for all, or one per prompt. Returns a list of n Completions per prompt.
        """
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        for i, (prompt, limit) in enumerate(zip(prompts, limits)):
            self.submit(i, prompt, n, limit, temperature, top_p, logprobs)
        done = {}
        while self.running:
            done |= self.step()
        return [done[i] for i in range(len(prompts))]

    def _completion(self, output):
        ids = list(output.token_ids)
        logprobs = [entry[i].logprob for entry, i in zip(output.logprobs, ids)] if output.logprobs is not None else None
        self.aborted += output.finish_reason not in ("stop", "length")
        return Completion(ids, output.finish_reason == "stop", logprobs)

    def decode(self, token_ids):
        """The text of token ids, without special tokens and exactly as the tokens spell it."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def text(self, token_ids):
        """The response that token ids spell: decode, cut off before the first stop string."""
        text = self.decode(token_ids)
        return text[: min((text.find(s) for s in self.stop if s in text), default=len(text))]

    def stops(self, token_ids):
        """Whether a stop string stands in the text; vLLM overlooks one that begins in the prompt it was given."""
        return any(stop in self.decode(token_ids) for stop in self.stop)

    def load_weights(self, named_tensors):
        """Take the policy's new weights, an iterator of (name, whole tensor), and forget the prefixes cached under the old ones."""
        self._wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})  # one call: chunks restore absent layers
        self._wake("kv_cache")
        self.asleep = False
        self._forget_prefixes()  # vLLM keeps them across weight updates: the values would be the old policy's

    def _forget_prefixes(self):
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the engine could not drop its prefix cache: requests are still running")

    def sleep(self):
        """Free the GPU's memory for training; load_weights wakes the engine. Does nothing on CPU."""
        if self.on_gpu and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def _wake(self, tag):
        if self.asleep:
            self.llm.wake_up(tags=[tag])

    def prefix_cache_counts(self):
        """(prompt tokens looked up, prompt tokens found) in the prefix cache since the engine started."""
        counts = {m.name: m.value for m in self.llm.get_metrics() if m.name.startswith("vllm:prefix_cache")}
        return counts["vllm:prefix_cache_queries"], counts["vllm:prefix_cache_hits"]

    def shutdown(self):
        """Stop the engine; call it before the process group is destroyed."""
        self.llm.llm_engine.engine_core.shutdown()
