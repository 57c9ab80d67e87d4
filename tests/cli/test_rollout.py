"""`gradstore rollout` with what real models and data bring: wide vocabularies, templates, parts, unreadable truths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradstore import RequestError
from gradstore.cli import main  # noqa: F401 - registers the commands before `cli` is called


@pytest.fixture(scope="module")
def thinking_folder(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """A model whose vocabulary is wider than its tokenizer's, with a template that takes an argument."""
    import copy

    import torch

    folder = tmp_path_factory.mktemp("thinking")
    model, tokenizer = copy.deepcopy(tiny_model), copy.copy(tiny_tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer) + 200)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROBLEMS = [
    {"id": f"p{i}", "prompt": [{"role": "user", "content": f"What is {i}?"}], "ground_truth": str(i)} for i in range(4)
]
SHORT = ("--reward", "math", "-n", 2, "--max-new-tokens", 12)


def test_ids_of_a_padded_vocabulary(
    cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable, accepted: tuple
) -> None:
    """Sampled, written as text, and read again: collect takes what rollout wrote."""
    problems, out = write_lines(tmp_path / "p.jsonl", PROBLEMS), tmp_path / "r.jsonl"
    status, _, err = cli("rollout", problems, "--model", thinking_folder, *SHORT, "--out", out)
    assert status == 0, err
    assert max(max(row["response_ids"]) for row in _rows(out)) >= 260
    rows = [row | {"reward": float(j % 2)} for j, row in enumerate(_rows(out))]
    write_lines(out, rows)
    arguments = ("--model", thinking_folder, "--basis", "random", "--rank", 4, *accepted)
    status, _, err = cli("collect", tmp_path / "s", "pool", out, *arguments)
    assert status == 0, err
    rows[3]["response_ids"][0] = 460
    status, _, err = cli("collect", tmp_path / "other", "pool", write_lines(tmp_path / "bad.jsonl", rows), *arguments)
    assert status == 2
    assert "bad.jsonl, line 4: field 'response_ids' entry 0 is 460, expected a token id below 460, the model's" in err


def test_template_arguments(cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable) -> None:
    """They are in the prompts and in the settings, and a dump rendered with them finds its problems."""
    problems, out = write_lines(tmp_path / "p.jsonl", PROBLEMS), tmp_path / "r.jsonl"
    off = ("--template-kwargs", '{"enable_thinking": false}')
    asked = ("rollout", problems, "--model", thinking_folder, *SHORT, "--out", out)
    status, _, err = cli(*asked, *off)
    assert status == 0, err
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(thinking_folder)
    prompts = [tokenizer.decode(row["prompt_ids"]) for row in _rows(out)]
    assert all(prompt.endswith("<think></think>") for prompt in prompts)
    assert json.loads((tmp_path / "r.jsonl.settings.json").read_text(encoding="utf-8"))["template_kwargs"] == {
        "enable_thinking": False
    }
    status, _, err = cli(*asked)
    assert status == 2
    assert "template_kwargs.enable_thinking was False, now None" in err
    dump = [
        {
            "input": tokenizer.decode(row["prompt_ids"], skip_special_tokens=True),
            "output": "x",
            "score": j % 2,
            "step": 1,
        }
        for j, row in enumerate(_rows(out))
    ]
    arguments = ("--model", thinking_folder, "--problems", problems, "--append-eos", "--basis", "random", "--rank", 4)
    collect = ("collect", tmp_path / "s", "pool", write_lines(tmp_path / "1.jsonl", dump), *arguments)
    status, _, err = cli(*collect)
    assert status == 2
    assert "--template-kwargs" in err
    status, _, err = cli(*collect, *off)
    assert status == 0, err
    for wrong, told in (
        ("[1]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"thinkin_": 1}', "no argument"),
    ):
        status, _, err = cli(*asked[:-1], tmp_path / "other.jsonl", "--template-kwargs", wrong)
        assert (status, told in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "other.jsonl").exists()


def test_messages_of_every_kind(cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable) -> None:
    """Parts of text are sampled from; what cannot be rendered is named by file, row and message."""
    parts = [
        {"id": "a", "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "ground_truth": "1"}
    ]
    out = tmp_path / "r.jsonl"
    asked = ("--model", thinking_folder, *SHORT)
    status, _, err = cli("rollout", write_lines(tmp_path / "p.jsonl", parts), *asked, "--out", out)
    assert status == 0, err
    status, _, err = cli("collect", tmp_path / "s", "pool", out, "--model", thinking_folder, "--basis", "random")
    assert status == 0, err
    status, _, err = cli("rollout", tmp_path / "p.jsonl", *asked, "--out", tmp_path / "r.parquet")
    assert status == 2, err
    assert "Parquet keeps messages of role and content text alone; write .jsonl" in err
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "calc"}]}
    bad = {
        "picture": ([{"role": "user", "content": [{"type": "image"}]}], "message 0 has a part of type 'image'"),
        "call": ([{"role": "user", "content": "u"}, call], "message 1 calls tools"),
        "null": ([{"role": "user", "content": None}], "message 0 has no content"),
    }
    for name, (prompt, told) in bad.items():
        path = write_lines(tmp_path / f"{name}.jsonl", [*PROBLEMS, {"id": "z", "prompt": prompt, "ground_truth": "1"}])
        status, _, err = cli("rollout", path, *asked, "--out", tmp_path / f"{name}.out.jsonl")
        assert status == 2, err
        assert err.startswith(f"gradstore: {path}, line 5: problem 'z': {told}")
        assert err.count("\n") == 1
        assert not (tmp_path / f"{name}.out.jsonl").exists()
    path = write_lines(tmp_path / "tools.jsonl", [PROBLEMS[0] | {"tools": [{"name": "calc"}]}])
    status, _, err = cli("rollout", path, *asked, "--out", tmp_path / "t.jsonl")
    assert status == 2
    assert "the problem has tools, which the chat template leaves out" in err


def test_unreadable_truths(cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable) -> None:
    """Refused before the model is loaded; left out by name where that is asked for."""
    rows = [*PROBLEMS, *({"id": f"u{i}", "prompt": "q", "ground_truth": "the $ sign"} for i in range(7))]
    problems, out = write_lines(tmp_path / "p.jsonl", rows), tmp_path / "r.jsonl"
    asked = ("rollout", problems, *SHORT, "--out", out)
    unread = tmp_path / "unread"
    unread.mkdir()
    (unread / "config.json").write_text("{}", encoding="utf-8")
    status, _, err = cli(*asked, "--model", unread)
    assert status == 2
    assert "cannot pay 7 of 11 problems" in err
    assert f"{problems}, line 5: problem 'u0'" in err
    assert not out.exists()
    status, printed, err = cli(*asked, "--model", thinking_folder, "--skip-unreadable", "--json")
    assert status == 0, err
    assert [f"problem 'u{i}'" in line for i, line in enumerate(json.loads(printed)["left_out"])] == [True] * 7
    assert all(f"left out: {problems}, line {5 + i}: problem 'u{i}'" in err for i in range(7))
    assert {row["problem_id"] for row in _rows(out)} == {row["id"] for row in PROBLEMS}
    pool = ("--pool", problems, "--model", unread, "--out", tmp_path / "run")
    status, _, err = cli("train", *pool, "--benchmark", problems, "selected=2", "candidates=4")
    assert (status, "cannot pay 7 of 11 problems" in err) == (2, True), err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tensor-parallel-size", 2), "--tensor-parallel-size: only for --backend vllm"),
        (
            ("--gpu-memory-utilization", 0.5, "--max-model-len", 99),
            "--gpu-memory-utilization, --max-model-len: only for",
        ),
        (("--backend", "vllm", "--batch-tokens", 9), "--batch-tokens: only for --backend transformers, not for vllm"),
        (("--pipeline-parallel-size", 2), "--pipeline-parallel-size: only for --backend vllm, not for transformers"),
        (("--range", "1"), "--range 1: expected A:B with 0 <= A < B"),
        (("--range", "0:99"), "p.jsonl has "),
        (("--backend", "vllm", "--device", "cpu"), "--device: only for --backend transformers, not for vllm"),
        (("--backend", "other"), "back end 'other' is not one of"),
        (("--batch-tokens", 0), "batch_tokens is 0, expected at least 1"),
    ],
)
def test_options_of_one_back_end(
    cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable, options: tuple, told: str
) -> None:
    """An option that would do nothing is refused."""
    problems = write_lines(tmp_path / "p.jsonl", PROBLEMS)
    status, _, err = cli(
        "rollout", problems, "--model", thinking_folder, *SHORT, "--out", tmp_path / "r.jsonl", *options
    )
    assert (status, told in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "r.jsonl").exists()


def test_a_range_of_the_problems(cli: Callable, tmp_path: Path, thinking_folder: Path, write_lines: Callable) -> None:
    """GradAlign's --min_problems and --max_problems: a part of the file, for one of several machines."""
    rows = [{"id": f"p{i}", "prompt": f"{i}+1=", "ground_truth": str(i + 1)} for i in range(6)]
    problems, out = write_lines(tmp_path / "many.jsonl", rows), tmp_path / "r.jsonl"
    status, _, err = cli("rollout", problems, "--model", thinking_folder, *SHORT, "--out", out, "--range", "2:4")
    assert status == 0, err
    ids = [json.loads(line)["problem_id"] for line in out.read_text(encoding="utf-8").splitlines()]
    assert list(dict.fromkeys(ids)) == ["p2", "p3"]


def test_vllm_gets_what_is_asked(cli: Callable, tmp_path: Path, write_lines: Callable, monkeypatch) -> None:
    """Parallel sizes, memory share and length reach vLLM's engine by the names that it knows."""
    asked = {}

    def load(name: str, model: str, **options: object) -> None:
        asked.update(options, name=name)
        raise RequestError("enough seen")

    monkeypatch.setattr("gradstore.trainer.sampling.backends.load_backend", load)
    problems = write_lines(tmp_path / "p.jsonl", PROBLEMS)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    status, _, err = cli(
        *("rollout", problems, "--model", tmp_path, *SHORT, "--out", tmp_path / "r.jsonl", "--backend", "vllm"),
        *("--tensor-parallel-size", 2, "--pipeline-parallel-size", 3, "--gpu-memory-utilization", 0.5),
        *("--max-model-len", 4096),
    )
    assert (status, "enough seen" in err) == (2, True)
    assert asked == {
        "name": "vllm", "trust_remote_code": False, "tensor_parallel_size": 2, "pipeline_parallel_size": 3,
        "gpu_memory_utilization": 0.5, "max_model_len": 4096,
    }  # fmt: skip
