"""What is said before anything starts about the machine's GPUs."""

import pytest
import torch

from support.ranks import check_gpus


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on PATH, which ends so."""

    def put(output, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


@pytest.mark.parametrize(
    "cuda, message",
    [
        ("13.0", "2 GPUs with driver 535.104.05, but torch .* needs driver 580 or newer"),
        (None, "2 GPUs with driver 535.104.05, but torch .* was built without CUDA"),
    ],
)
def test_gpus_that_torch_cannot_use_are_named_with_the_reason(cuda, message, nvidia_smi, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi("535.104.05\\n535.104.05\\n")
    with pytest.raises(ValueError, match=message) as error:
        check_gpus()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants the CPU
    check_gpus()


def test_a_machine_without_gpus_says_nothing(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA-SMI has failed because it could not communicate with the driver", code=9)
    check_gpus()
    monkeypatch.setenv("PATH", "/nowhere")
    check_gpus()
