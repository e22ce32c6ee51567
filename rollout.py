"""The engine, one vLLM in each rank's process: it samples, takes new weights, sleeps while the GPU trains.

    sample(engine, grader, episodes, s)     responses of episodes, with their rewards
    evaluate(engine, grader, problems, s)   the same with the settings of evaluations

The only file that imports vLLM. First join the process group (ranks.init_distributed), then make the Engine,
then the trainer's networks.
"""

import copy
import logging
import os
import warnings
from collections import deque
from dataclasses import replace
from functools import partialmethod

import numpy as np
import torch
import torch.distributed as dist

# read when vLLM is imported
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
loud = torch.cuda.is_available() and os.environ.get("RANK", "0") == "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if loud else "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # while it is imported
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report home
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # it forgets yarn's factor; pretrained.positions knows it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB per rank; without a GPU only
# vLLM's own sampling kernels (Triton): FlashInfer's are compiled with ninja and nvcc, or the start fails
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
if not torch.cuda.is_available():
    torch._dynamo.config.disable = True  # vLLM would compile its sampling helpers for 20 s
warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams
from vllm.config import CompilationConfig, CompilationMode
from vllm.sampling_params import RequestOutputKind

from episode import Completion, Episode, State
from support.model_files import local_folder
from support.pretrained import end_of_turn, tokenizer_folder
from support.ranks import drop_shared_memory


def episodes_for(problems, n):
    """n episodes for each problem, still without a response."""
    return [Episode(p.prompt_ids, p.prompt, p.answer) for p in problems for _ in range(n)]


def sample(engine, grader, episodes, s, on_response=None, logprobs=True):
    """Fill the episodes with responses sampled at s.temperature and s.top_p, and their rewards.

    on_response(episode) is called when a response ends, while others are still generated. Requests that it
    submits to the engine can still be running when this function returns.
    """
    for e in episodes:
        engine.submit(e, 1, s.max_tokens, s.temperature, s.top_p, logprobs)
    missing = len(episodes)
    while missing:
        for record in engine.advance(grader):
            if isinstance(record, Episode):
                missing -= 1
                if on_response:
                    on_response(record)
    grader.set_rewards(episodes)


def evaluate(engine, grader, problems, s):
    """Episodes with rewards: s.eval_samples responses to each problem of this engine's share."""
    episodes = episodes_for(engine.share(problems), s.eval_samples)
    sample(engine, grader, episodes, replace(s, temperature=s.eval_temperature), logprobs=False)
    return episodes


class Engine:
    """vLLM with prefix caching, for token ids in and token ids out.

    s: settings with model, trust_remote_code, bfloat16; max_sequence: token limit of prompt and response
    together; stop: a string that ends a response, or None; chat: the template's end of a turn ends a
    response too; gpu_memory: share of a GPU for weights and KV cache; max_sequences: how many can run at a
    time, None: 1,024 on GPUs above 70 GiB, else 256; tensor_parallel_size: this many consecutive ranks share
    one model; they must submit the same requests in the same order, and get the same completions. watch: its
    step() is called before each step and can raise, to abandon what is running; its beat() after each tensor
    of new weights. None: nobody watches.
    """

    def __init__(self, s, watch=None):
        self.on_gpu, self.watch = torch.cuda.is_available(), watch
        self.asleep = False
        self.tensor_parallel = s.tensor_parallel_size
        self.engines = dist.get_world_size() // self.tensor_parallel
        self.number = dist.get_rank() // self.tensor_parallel  # of this engine among all
        self.leads = dist.get_rank() % self.tensor_parallel == 0  # the rank that speaks for the engine
        self.waiting = deque()  # (record, SamplingParams) for which vLLM has no room yet
        self.running = {}  # request id -> (record, SamplingParams)
        self.submitted, self.steps = 0, 0
        self.aborted = 0  # completions that vLLM aborted; they count as unfinished
        bfloat16 = self.on_gpu if s.bfloat16 is None else s.bfloat16
        max_sequences, compilation = s.max_sequences, {}
        if self.on_gpu:
            memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            max_sequences = max_sequences or (1024 if memory > 70 * 2**30 else 256)
            if max_sequences > 512:  # else larger steps would run without CUDA graphs, whose sizes step by 16
                compilation["max_cudagraph_capture_size"] = -(-max_sequences // 16) * 16
        drop_shared_memory(self.tensor_parallel)
        self.llm = LLM(
            local_folder(s.model),
            tokenizer=tokenizer_folder(s.model, s.trust_remote_code),
            dtype="bfloat16" if bfloat16 else "float32",
            distributed_executor_backend="external_launcher",  # use torchrun's ranks and process group
            tensor_parallel_size=self.tensor_parallel,
            tokenizer_mode="hf",  # the trainer's, also where Mistral's own layout lies beside it
            config_format="hf",
            load_format="safetensors",
            trust_remote_code=s.trust_remote_code,
            max_model_len=s.max_sequence,
            max_num_seqs=max_sequences,
            enable_prefix_caching=True,
            block_size=16 if self.on_gpu else 32,  # tokens; only whole blocks of a prefix are cached
            gpu_memory_utilization=s.gpu_memory,
            enable_sleep_mode=self.on_gpu,
            enforce_eager=not self.on_gpu,
            compilation_config=compilation,
            use_tqdm_on_load=False,
            disable_log_stats=False,  # counts the prefix cache's hits
        )
        self.llm.apply_model(leave_class_usable)
        self.tokenizer = self.llm.get_tokenizer()
        self.stop, self.stop_ids = stops(s, self.tokenizer)
        self.max_sequences = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        # the sampler's kernels are compiled at the first step, which takes seconds on a GPU: here, not in a phase
        self.submit(State([0], []), n=1, max_tokens=1, temperature=0.5, top_p=0.5, logprobs=True)
        while self.running:
            self.step()

    # --- ranks: several engines share the problems; several ranks can share an engine ---

    def share(self, problems):
        """This engine's share of the problems."""
        return problems[self.number :: self.engines]

    def my_share(self, episodes):
        """This rank's share of its engine's episodes, to train on."""
        size = len(episodes) // self.tensor_parallel
        return episodes[dist.get_rank() % self.tensor_parallel * size :][:size]

    # --- requests ---

    def seed(self, *numbers):
        """From here on samples depend only on these integers, the weights and the engine's number."""
        number = hash((*numbers, self.number))
        # vLLM draws from global generators: on CPU from torch's, on GPUs a seed for each sequence from numpy's
        torch.manual_seed(number % 2**63)
        np.random.seed(number % 2**32)
        self._forget_prefixes()  # a cached prefix differs from one computed anew in the last bit

    def submit(self, record, n, max_tokens, temperature, top_p=1.0, logprobs=False):
        """Queue n completions of a record's prompt and prefix. step() returns the record with them.

        Records can be submitted while others are generated. Those for which vLLM has no room are in `waiting`.
        """
        params = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=self.stop or None,
            stop_token_ids=self.stop_ids,
            detokenize=bool(self.stop), logprobs=0 if logprobs else None,  # 0: of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self.waiting.append((record, params))
        self._fill()

    def take_waiting(self):
        """Take the waiting records back: they are no longer submitted."""
        records = [record for record, _ in self.waiting]
        self.waiting.clear()
        return records

    def _fill(self):
        """Give vLLM the waiting records, as long as it has fewer than max_sequences sequences."""
        while self.waiting and self.llm.llm_engine.get_num_unfinished_requests() < self.max_sequences:
            record, params = self.waiting.popleft()
            request_id = str(self.submitted)
            self.submitted += 1
            self.running[request_id] = record, params
            prompt = {"prompt_token_ids": record.prompt_ids + record.prefix_ids}
            self.llm.llm_engine.add_request(request_id, prompt, params)

    def step(self):
        """One step, a token for each running sequence: [(record, its completions)] of the ended records."""
        if self.watch:
            self.watch.step()
        self.steps += 1
        ended = {output.request_id: output.outputs for output in self.llm.llm_engine.step()}
        if not ended and not self.llm.llm_engine.has_unfinished_requests():
            ended = dict.fromkeys(self.running, [])  # vLLM dropped these and did not say so
        done = []
        for request_id, outputs in ended.items():
            record, params = self.running.pop(request_id)
            completions = [self._completion(record.prefix_ids, output) for output in outputs]
            missing = params.n - len(completions)
            self.aborted += missing
            completions += [Completion([], "", False, None) for _ in range(missing)]
            done.append((record, completions))
        self._fill()
        return done

    def advance(self, grader):
        """One step; fills the records that end with it and grades them in the background. Returns them."""
        ended = []
        for record, completions in self.step():
            record.receive(completions)
            grader.begin(record)
            ended.append(record)
        return ended

    def _completion(self, prefix_ids, output):
        ids = list(output.token_ids)
        logprobs = None
        if output.logprobs is not None:
            logprobs = [entry[i].logprob for entry, i in zip(output.logprobs, ids)]
        text = self.decode(prefix_ids + ids)
        # vLLM overlooks a stop string that begins in the prefix
        stops = [text.find(s) for s in self.stop if s in text]
        self.aborted += output.finish_reason not in ("stop", "length")
        finished = output.finish_reason == "stop" or bool(stops)
        return Completion(ids, text[: min(stops, default=len(text))], finished, logprobs)

    def decode(self, token_ids):
        """The text of token ids, without special tokens and exactly as the tokens spell it."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # --- weights and memory ---

    def load_weights(self, named_tensors):
        """Take the policy's new weights, an iterator of (name, whole tensor), and wake."""
        self._wake("weights")
        if self.watch:
            named_tensors = self.watch.each(named_tensors)
        # one call for all: each call would restore the layers that it does not bring
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        self._wake("kv_cache")
        self.asleep = False
        self._forget_prefixes()  # vLLM keeps them across weight updates: values would be the old policy's

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
        counts = {m.name: m.value for m in self.llm.get_metrics() if "prefix_cache" in m.name}
        return counts["vllm:prefix_cache_queries"], counts["vllm:prefix_cache_hits"]

    def shutdown(self):
        """Stop the engine, which destroys the process group."""
        drop_shared_memory(self.tensor_parallel)
        self.llm.llm_engine.engine_core.shutdown()


def leave_class_usable(model):
    """Let the trainer make networks of a transformers class that vLLM's model uses.

    Where vLLM has no implementation of its own it takes transformers' class and changes it: an instance made
    elsewhere would ask for vLLM's configuration, and vLLM would compile it.
    """
    for cls in {
        type(m) for m in model.modules() if isinstance(m, PreTrainedModel) and hasattr(m, "vllm_config")
    }:
        plain = copy.copy(model.vllm_config)
        plain.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
        cls.__init__ = partialmethod(cls.__init__, vllm_config=plain)


def stops(s, tokenizer):
    """(strings, token ids) that end a response: special tokens, which no decoded text has, become ids.

    s: settings with stop and chat.
    """
    stop = [x for x in (s.stop, end_of_turn(tokenizer) if s.chat else None) if x]
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [x for x in stop if x not in special], [special[x] for x in stop if x in special]


def shut_down(engine, grader):
    """End what a program started. All ranks call it, before ranks.exit_all."""
    engine.watch.close()
    grader.close()
    dist.barrier()
    engine.shutdown()
