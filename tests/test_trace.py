"""The trainer's path on GPUs, traced without one.

Fake tensors on a pretended device "gpu" go through a whole update on one of eight ranks: bf16, packed
attention's variable-length kernel, FSDP2, recomputed activations, a reference in host memory. Shapes, types
and devices are checked at every operation, nothing is computed. What only a GPU knows stays
unseen: streams, kernels, collectives.
"""

import gc
import json
import sys
import weakref

import pytest
from conftest import python, settings
from test_plan import config_of, training

from tools.plan import REST

TINY = dict(
    vocab_size=100, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


FAULTS = {  # what is broken: how the trace shows it
    "the advantages on the CPU": "device",
    "heads where tokens belong": "heads",
    "keys in float32": "bfloat16",
    "lengths in int64": "int32",
    "positions of a longer row": "shape",
}


def test_an_update_goes_through_on_a_pretended_gpu_and_faults_are_seen():
    done = python(__file__, "tiny")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == "went through: 13 metrics, 18 calls of the kernel", found
    for fault, words in FAULTS.items():
        assert words in found[fault], found


@pytest.mark.slow
@pytest.mark.parametrize("size", ["rho", "deepseekmath", "0.5B", "1.5B"])
def test_the_plan_says_what_a_step_of_the_papers_models_and_of_the_recipes_needs(size):
    done = python(__file__, size)
    assert done.returncode == 0, done.stderr
    plan = sum(training(size).values()) - REST
    assert float(done.stdout.split()[-1]) == pytest.approx(plan, rel=0.05)


class Trace:
    """The pretended device, and what stands in for what fake tensors cannot do. One per process."""

    count = 3  # micro-batches of a minibatch, as the ranks would agree on it

    def __init__(self, size):
        import torch
        import torch.distributed as dist
        from torch._subclasses import FakeTensorMode
        from torch._subclasses.fake_impls import op_implementations_dict
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
        from transformers import AutoModelForCausalLM, LlamaConfig

        import learner
        import model
        import ppo

        self.torch, self.config = torch, LlamaConfig(**TINY) if size == "tiny" else config_of(size)
        _setup_privateuseone_for_python_backend("gpu")
        for name in ("Event", "Stream", "current_stream", "stream"):
            setattr(torch.gpu, name, getattr(torch.cpu, name))
        torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]
        self.device = torch.device("gpu", 0)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        mesh = dist.device_mesh.init_device_mesh("gpu", (8,))
        numbers = lambda mode, func, x: 1.0 if x.dtype.is_floating_point else Trace.count  # what item() gives
        op_implementations_dict[torch.ops.aten._local_scalar_dense.default] = numbers
        made = torch.tensor

        def tensor(values, dtype=None, device=None):  # without its values, which would be computed
            like = made(values, dtype=dtype)
            return torch.empty(like.shape, dtype=like.dtype, device=device)

        torch.tensor = tensor
        torch.Tensor.new_tensor = lambda x, values: tensor(values, x.dtype, x.device)
        torch.Tensor.pin_memory = lambda x, *_: x

        def from_pretrained(path, *, config, dtype, attn_implementation, **_):
            kind = self.config.dtype or torch.float32 if dtype == "auto" else dtype
            network = AutoModelForCausalLM.from_config(
                config, dtype=kind, attn_implementation=attn_implementation
            )
            return self.moved(network, self.device)

        moved_float = lambda module: self.moved(module, self.device, torch.float32)
        torch.nn.Module.float = moved_float
        model.AutoConfig.from_pretrained = lambda *_, **__: self.config
        model.AutoModelForCausalLM.from_pretrained = from_pretrained
        model.generation_config = lambda path: None
        model.device_mesh, model.local_folder = (lambda *_: mesh), (lambda path: path)
        self.ppo, self.model, self.learner, self.kernels = ppo, model, learner, 0
        self.varlen, model.varlen_attn = model.varlen_attn, self.kernel
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def moved(self, module, device, dtype=None):
        """The module with new parameters and buffers on the device; tied ones stay tied."""
        torch, new = self.torch, {}
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and id(p) not in new:
                    new[id(p)] = torch.nn.Parameter(
                        torch.empty_like(p, device=device, dtype=dtype), p.requires_grad
                    )
                if p is not None:
                    part._parameters[name] = new[id(p)]
            for name, x in part._buffers.items():
                if x is not None:
                    part._buffers[name] = torch.empty_like(x, device=device)
        return module

    def kernel(self, q, k, v, starts_q, starts_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        """torch.nn.attention.varlen_attn, with what its documentation asks for."""
        torch, c = self.torch, self.config
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16, "the kernel takes bfloat16"
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        assert [x.shape[1] for x in (q, k, v)] == [heads, kv_heads, kv_heads], "heads come second"
        assert starts_q.dtype == starts_k.dtype == torch.int32, "sequences begin at int32 positions"
        assert q.device == k.device == v.device == starts_q.device == starts_k.device == self.device, "device"
        assert longest_q == longest_k <= len(q) == len(k) == len(v) and window_size[1] == 0 and enable_gqa
        self.kernels += 1
        options = dict(scale=scale, window_size=window_size, enable_gqa=enable_gqa)
        return self.varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)

    def outcome(self, name, place, broken):
        """How an update ends in which `place.name` is `broken`."""
        kept = getattr(place, name)
        setattr(place, name, broken)
        try:
            metrics = self.trainer.update(episodes(8, 20, 30))
            return f"went through: {len(metrics)} metrics, {self.kernels} calls of the kernel"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            setattr(place, name, kept)


def episodes(count, prompt, response):
    from episode import Episode

    x = [0.1] * response
    new = lambda: Episode([1] * prompt, response_ids=[2] * response, advantages=x, engine_logprobs=x)
    return [new() for _ in range(count)]


def trace(size):
    """Whole updates and broken ones of the tiny model."""
    t = Trace(size)
    torch, learner, model = t.torch, t.learner, t.model
    per_token, micro_batch, kernel = learner.per_token, learner.micro_batch, model.varlen_attn

    def longer(*a, **k):
        m = micro_batch(*a, **k)
        m.position_ids = torch.cat([m.position_ids, m.position_ids], 1)
        return m

    exchanged = lambda q, *rest, **k: kernel(q.transpose(0, 1), *rest, **k)
    in_float32 = lambda q, k, *rest, **o: kernel(q, k.float(), *rest, **o)
    in_int64 = lambda q, k, v, starts, *rest, **o: kernel(q, k, v, starts.long(), *rest, **o)
    with t.fake:
        sizes = dict(prompts_per_iteration=32, minibatch=64, epochs=1, micro_batch_tokens=200)
        t.trainer = t.ppo.Trainer(settings("", bfloat16=None, **sizes), t.device)
        found = {
            "whole": t.outcome("per_token", t.ppo, per_token),
            "the advantages on the CPU": t.outcome(
                "per_token", t.ppo, lambda e, name, device: per_token(e, name, "cpu")
            ),
            "heads where tokens belong": t.outcome("varlen_attn", model, exchanged),
            "keys in float32": t.outcome("varlen_attn", model, in_float32),
            "lengths in int64": t.outcome("varlen_attn", model, in_int64),
            "positions of a longer row": t.outcome("micro_batch", learner, longer),
        }
    print(json.dumps(found))


def peak(size):
    """Bytes of the pretended GPU at the peak of an update of two micro-batches of 8,192 tokens."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Memory(TorchDispatchMode):
        """Counts the storages that operations make, until they are freed or resized by FSDP."""

        def __init__(self):
            super().__init__()
            self.sizes, self.now, self.peak = {}, 0, 0
            resize = torch.UntypedStorage.resize_

            def counted(storage, size):
                resize(storage, size)
                if id(storage) in self.sizes:
                    self.add(id(storage), size - self.sizes[id(storage)])

            torch.UntypedStorage.resize_ = counted

        def add(self, key, size):
            self.sizes[key] = self.sizes.get(key, 0) + size
            self.now += size
            self.peak = max(self.peak, self.now)

        def drop(self, key):
            self.now -= self.sizes.pop(key)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in tree_leaves(out):
                x = getattr(x, "_local_tensor", x)
                if isinstance(x, torch.Tensor) and x.device.type == "gpu":
                    storage = x.untyped_storage()
                    if id(storage) not in self.sizes:
                        weakref.finalize(storage, self.drop, id(storage))
                        self.add(id(storage), storage.nbytes())
            return out

    sizes = dict(prompts_per_iteration=64, minibatch=128, epochs=1, micro_batch_tokens=8192)
    Trace.count = 2
    t = Trace(size)
    with t.fake, Memory() as memory:
        trainer = t.ppo.Trainer(settings("", bfloat16=None, **sizes), t.device)
        batch = episodes(16, 224, 800)
        trainer.update(batch)  # makes AdamW's state
        gc.collect()
        memory.peak = memory.now
        trainer.update(batch)
    print(memory.peak)


if __name__ == "__main__":
    (trace if sys.argv[1] == "tiny" else peak)(sys.argv[1])
