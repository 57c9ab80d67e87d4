"""Model folders of others: their code does not run unless a flag says so, their pickles build nothing, and the error is
one line."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from gradstore.engine.gradients.models import load_model, load_tokenizer, vocabulary_size
from gradstore.engine.gradients.optimizer_direction import AdamState
from gradstore.errors import RequestError

MARK = "MARK_FILE"
CODE = f"""
import os
open(os.environ["{MARK}"], "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OddConfig(LlamaConfig):
    model_type = "odd"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Hostile:
    """An object whose unpickling writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that code of a folder would write."""
    monkeypatch.setenv(MARK, str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def refused(work: Any) -> str:
    with pytest.raises(RequestError) as raised:
        work()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def with_code(folder: Path, make_model: Any) -> Path:
    """A model folder of an architecture that only its own Python file knows."""
    make_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    config |= {"model_type": "odd", "architectures": ["OddModel"], "auto_map": parts}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    about = {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    (folder / "odd.py").write_text(CODE, encoding="utf-8")
    return folder


def test_code_of_a_folder_does_not_run(make_model: Any, tmp_path: Path, mark: Path) -> None:
    """And the error names the flag."""
    folder = with_code(tmp_path / "model", make_model)
    for work in (lambda: load_model(folder, device="cpu"), lambda: load_tokenizer(folder)):
        assert "--trust-remote-code" in refused(work)
    assert vocabulary_size(folder) is None
    assert not mark.exists()


def test_code_of_a_folder_runs_with_the_flag(make_model: Any, tmp_path: Path, mark: Path) -> None:
    """In a process of its own: transformers would keep the class."""
    folder = with_code(tmp_path / "model", make_model)
    code = (
        "import sys; from gradstore.engine.gradients.models import load_model\n"
        "print(type(load_model(sys.argv[1], device='cpu', trust_remote_code=True)).__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=250)
    assert ran.stdout.split()[-1:] == ["OddModel"], ran.stderr
    assert mark.exists()


@pytest.mark.parametrize(
    "command",
    [
        ["rollout", "{problems}", "--out", "{tmp}/out.jsonl", "--reward", "math", "--model", "{model}"],
        [
            "train",
            "--pool",
            "{problems}",
            "--benchmark",
            "{problems}",
            "--out",
            "{tmp}/run",
            "--model",
            "{model}",
            "selected=1",
            "candidates=1",
        ],
    ],
    ids=["rollout", "train"],
)
def test_commands_name_the_flag_and_never_ask(command: list, make_model: Any, tmp_path: Path, mark: Path) -> None:
    """Even where somebody could answer: "y" stands on standard input."""
    folder = with_code(tmp_path / "model", make_model)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"id": "a", "prompt": "1 + 1?", "ground_truth": "2"}\n', encoding="utf-8")
    places = {"problems": str(problems), "tmp": str(tmp_path), "model": str(folder)}
    words = [word.format(**places) for word in command]
    ran = subprocess.run(
        [sys.executable, "-m", "gradstore", *words], input="y\ny\ny\n", capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 2, ran.stderr
    assert "--trust-remote-code" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "[y/N]" not in ran.stdout + ran.stderr
    assert not mark.exists()


def test_pickled_weights_build_no_objects(make_model: Any, tmp_path: Path) -> None:
    """A folder with nothing but pytorch_model.bin: honest weights load, objects do not."""
    model, mark = make_model("llama"), tmp_path / "ran"
    model.config.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "pytorch_model.bin"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, weights)
    load_model(tmp_path / "model", device="cpu")
    torch.save({**state, "model.norm.weight": Hostile(mark)}, weights)
    refused(lambda: load_model(tmp_path / "model", device="cpu"))
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_pickled_adapters_build_no_objects(make_model: Any, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    make_model("llama").save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Hostile(mark)}, tmp_path / "adapter" / "adapter_model.bin")
    refused(lambda: load_model(tmp_path / "model", tmp_path / "adapter", "cpu"))
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_adapters_import_no_modules(make_model: Any, tmp_path: Path, mark: Path, monkeypatch: Any) -> None:
    """PEFT imports the module that `megatron_core` names."""
    make_model("llama").save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    about = json.loads(file.read_text(encoding="utf-8")) | {"megatron_config": {}, "megatron_core": "planted"}
    file.write_text(json.dumps(about), encoding="utf-8")
    (tmp_path / "planted.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert "megatron_config" in refused(lambda: load_model(tmp_path / "model", tmp_path / "adapter", "cpu"))
    assert not mark.exists()


def test_pickled_optimizers_build_no_objects(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"state": {0: Hostile(mark)}, "param_groups": []}, tmp_path / "optimizer.pt")
    refused(lambda: AdamState.of_file(tmp_path / "optimizer.pt", nn.Linear(2, 2)))
    assert not mark.exists()


def test_pickled_checkpoints_build_no_objects(tmp_path: Path) -> None:
    from gradstore.trainer.local.checkpoint import FORMAT, load_checkpoint

    mark = tmp_path / "ran"
    for content in ({"format": FORMAT, "weights": Hostile(mark)}, {"format": FORMAT, "weights": 3}, [1], {}):
        torch.save(content, tmp_path / "checkpoint.pt")
        refused(lambda: load_checkpoint(tmp_path / "checkpoint.pt", None))  # type: ignore[arg-type]
    (tmp_path / "checkpoint.pt").write_bytes(os.urandom(1000))
    refused(lambda: load_checkpoint(tmp_path / "checkpoint.pt", None))  # type: ignore[arg-type]
    assert not mark.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"null", b'{"model_type": []}', b"[" * 100_000])
def test_broken_files_are_one_line(make_model: Any, tmp_path: Path, name: str, content: bytes) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    for work in (lambda: load_model(tmp_path, device="cpu"), lambda: load_tokenizer(tmp_path)):
        try:
            work()
        except RequestError as error:
            line = str(error)
            assert "\n" not in line
    vocabulary_size(tmp_path)


def test_every_call_that_could_run_code_says_whether_it_may() -> None:
    """transformers' Auto classes ask on the terminal when nothing is said; no file is unpickled."""
    root = Path(__file__).parents[2]
    faults = []
    for file in root.glob("*/**/*.py"):
        top = file.relative_to(root).parts[0]
        if top.startswith(".") or top in ("tests", "build") or file.is_symlink():
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {one.arg for one in node.keywords}
            if name.startswith(("Auto", "transformers.Auto")) and name.endswith(".from_pretrained"):
                wanted = {"trust_remote_code"}
            elif name == "torch.load":
                wanted = {"weights_only"}
            elif name in ("np.load", "numpy.load"):
                wanted = {"allow_pickle"}
            else:
                wanted = {"nothing makes it safe"} if name in ("pickle.load", "pickle.loads", "joblib.load") else set()
            if not wanted <= given:
                faults.append(f"{file.relative_to(root)}:{node.lineno}: {name}")
    assert faults == []
