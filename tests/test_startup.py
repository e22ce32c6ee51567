"""Before anything starts: what is said about the machine's GPUs and Python; and what README and the pages say of
files, that they exist and which of them work alone.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

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


def test_an_old_python_is_refused_before_the_environment_is_made(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    old = tmp_path / "python3"  # says of itself that it is 3.8
    check = (
        "import sys, collections; V = collections.namedtuple('V', 'major minor'); sys.version_info = V(3, 8)"
    )
    old.write_text(f"""#!/bin/sh\nexec {sys.executable} -c "{check}; sys.version = '3.8.1 (main)'; $2"\n""")
    old.chmod(0o755)
    for name in ("requirements.txt", "requirements-cpu.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    command = ["make", f"PYTHON={old}", "install"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    assert f"{old} is 3.8.1: Python 3.11 or newer is needed, as in: make PYTHON=" in done.stderr


TAKE = re.findall(
    r"^\| ((?:`[\w/.]+` ?)+)\|[^|]*\|((?: ?`[\w/.]+`)*) ?\|$", (ROOT / "README.md").read_text(), re.M
)


@pytest.mark.parametrize("files, needed", TAKE)
def test_what_readme_says_to_copy_works_without_the_rest(files, needed, tmp_path):
    for name in re.findall(r"[\w/.]+", files + needed):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if name.endswith("/") else shutil.copy
        copy(ROOT / name, tmp_path / name)
    modules = ", ".join(name.removesuffix(".py").strip("/") for name in re.findall(r"[\w/.]+", files))
    options = dict(cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    done = subprocess.run([sys.executable, "-c", f"import {modules}"], **options)
    assert done.returncode == 0, done.stderr


def test_readme_says_what_to_copy():
    assert len(TAKE) == 5


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments" / "README.md"]


def anchors_of(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_of_a_page_is_dead(page):
    for file, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), file
        if target.suffix == ".md" and anchor:
            assert anchor in anchors_of(target), f"{file}#{anchor}"


def test_pages_that_the_code_names_exist():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), ROOT / "Makefile"]
    names = {name for file in files for name in re.findall(r"docs/[\w-]+\.\w+", file.read_text())}
    assert names and [name for name in names if not (ROOT / name).exists()] == []
