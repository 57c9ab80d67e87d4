"""Rollouts from a running server: those of the local back end, and nothing that a server cannot prove."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradstore import GradstoreError, RequestError
from gradstore.cli import main
from gradstore.trainer.sampling.backends import derived_seed, load_backend
from gradstore.trainer.sampling.backends.hugging_face import TransformersBackend
from gradstore.trainer.sampling.backends.server import ServerBackend
from gradstore.trainer.sampling.reward import Reward
from gradstore.trainer.sampling.rollout import rollout
from tests.trainer.policy_server import PolicyServer

PROBLEMS = [{"id": f"p{i}", "prompt": f"{i}+{i}=", "ground_truth": str(2 * i)} for i in range(9)]
REWARD = Reward("length", lambda record, response, j: float(len(response) % 2))
SHORT: dict[str, Any] = {"n": 3, "max_new_tokens": 12, "chunk": 4}


@pytest.fixture
def server(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[PolicyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = PolicyServer(TransformersBackend(tiny_model, tiny_tokenizer, batch_tokens=2000))
    yield made
    made.close()


@pytest.fixture
def connect(server: PolicyServer, model_folder: Path) -> Iterator[Callable[..., ServerBackend]]:
    """connect(**settings) -> a back end for the server."""
    made: list[Any] = []

    def load(**settings: Any) -> Any:
        given = {"server": server.url, "policy_version": "step-0", "server_timeout": 20.0, "retries": 1}
        made.append(load_backend("server", model_folder, **(given | settings)))
        return made[-1]

    yield load
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


class OneByOne:
    """The local back end, asked as a server is: for one problem at a time, with the problem's own seed."""

    def __init__(self, backend: TransformersBackend) -> None:
        self.backend, self.tokenizer, self.context = backend, backend.tokenizer, backend.context

    def generate(self, prompts: list[list[int]], n: int, *, seed: int, **settings: Any) -> Any:
        return [
            self.backend.generate([ids], n, seed=derived_seed(seed, place), **settings)[0]
            for place, ids in enumerate(prompts)
        ]

    def settings(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("api", "temperature"), [("vllm", 1.0), ("vllm", 0.7), ("vllm", 0.0), ("sglang", 0.0)])
def test_equal_to_the_local_back_end(
    server: PolicyServer, connect: Callable, tmp_path: Path, api: str, temperature: float
) -> None:
    """Ids, log-probabilities, texts, rewards and finish reasons; SGLang takes no seed, so only the greedy ones."""
    settings = SHORT | {"temperature": temperature}
    backend = connect(server_api=api, concurrency=3)
    report = rollout(PROBLEMS, backend, REWARD, tmp_path / "served.jsonl", **settings)
    rollout(PROBLEMS, OneByOne(server.backend), REWARD, tmp_path / "local.jsonl", **settings)  # type: ignore[arg-type]
    served, local = (
        [json.loads(line) for line in (tmp_path / name).open()] for name in ("served.jsonl", "local.jsonl")
    )
    assert served == local
    assert report.rollouts == 27
    assert {row["finish_reason"] for row in served} <= {"stop", "length"}
    kept = json.loads((tmp_path / "served.jsonl.settings.json").read_text())
    assert {name: kept[name] for name in ("backend", "api", "served_model", "policy_version")} == {
        "backend": "server",
        "api": api,
        "served_model": "toy",
        "policy_version": "step-0",
    }
    assert server.most_under_way <= 3
    assert server.url not in (tmp_path / "served.jsonl.settings.json").read_text()


def test_an_interrupted_run_goes_on(server: PolicyServer, connect: Callable, tmp_path: Path) -> None:
    """Whole chunks stay; the finished file is that of an undisturbed run, and another version is refused."""
    rollout(PROBLEMS, connect(), REWARD, tmp_path / "undisturbed.jsonl", **SHORT)
    rows = [json.loads(line) for line in (tmp_path / "undisturbed.jsonl").open()]
    sixth = next(row["prompt_ids"] for row in rows if row["problem_id"] == "p6")
    out = tmp_path / "r.jsonl"
    server.change = lambda answer, body: (400, b"out of order") if body["prompt"] == sixth else answer
    with pytest.raises(RequestError, match=r"problem 'p6': the server at .* HTTP 400: out of order"):
        rollout(PROBLEMS, connect(), REWARD, out, **SHORT)
    assert len(out.read_text().splitlines()) == 12
    server.change = lambda answer, body: answer
    with pytest.raises(RequestError, match="policy_version was 'step-0', now 'step-1'"):
        rollout(PROBLEMS, connect(policy_version="step-1"), REWARD, out, **SHORT)
    assert rollout(PROBLEMS, connect(), REWARD, out, **SHORT).kept_problems == 4
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_chunks_overlap_within_the_concurrency(server: PolicyServer, connect: Callable, tmp_path: Path) -> None:
    """The next chunk begins before a long last response of this one has ended; all together keep to the bound."""
    settings = SHORT | {"chunk": 1}
    rollout(PROBLEMS, connect(concurrency=2), REWARD, tmp_path / "r.jsonl", **settings)
    assert server.most_under_way == 2
    rollout(PROBLEMS, OneByOne(server.backend), REWARD, tmp_path / "local.jsonl", **settings)  # type: ignore[arg-type]
    assert (tmp_path / "r.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()


def test_a_busy_server_is_asked_again(server: PolicyServer, connect: Callable, tmp_path: Path) -> None:
    seen: list[int] = []

    def busy(answer: Any, body: dict) -> Any:
        seen.append(1)
        return (503, b"wait") if len(seen) % 3 == 0 else answer

    backend = connect(retries=5)
    server.change = busy
    assert rollout(PROBLEMS, backend, REWARD, tmp_path / "r.jsonl", **SHORT).rollouts == 27


def _first(answer: dict, **changes: Any) -> dict:
    """The answer with a changed first choice."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return answer | {"choices": [choices[0] | changes, *choices[1:]]}


def _logprobs(answer: dict, change: Callable[[list], list]) -> dict:
    found = next(choice["logprobs"] for choice in answer["choices"] if choice["index"] == 0)
    return _first(answer, logprobs=found | {"token_logprobs": change(found["token_logprobs"])})


def _text(answer: dict, old: str, new: str) -> tuple[int, bytes]:
    return 200, json.dumps(answer).replace(old, new).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: _first(a, logprobs=None), "choices.0.logprobs is missing: the server must return log-prob"),
        (
            lambda a: _first(a, token_ids=None, logprobs={"token_logprobs": [-1.0], "tokens": ["The"]}),
            "choices.0.token_ids is missing: the server must return token ids, as vLLM 0.10.2",
        ),
        (lambda a: _first(a, token_ids=[5, 6, 7]), "response 0 has 3 token ids and .* log-probabilities"),
        (lambda a: _first(a, token_ids=[]), "response 0 has 0 token ids and"),
        (lambda a: _logprobs(a, lambda one: [0.5, *one[1:]]), "log-probability 0 is 0.5, expected a finite number"),
        (lambda a: _logprobs(a, lambda one: [*one[:-1], float("-inf")]), "is -inf, expected a finite number"),
        (lambda a: _logprobs(a, lambda one: [float("nan"), *one[1:]]), "is nan, expected a finite number"),
        (lambda a: _logprobs(a, lambda one: [None, *one[1:]]), "token_logprobs.0: Input should be a valid number"),
        (lambda a: _logprobs(a, lambda one: ["-1", *one[1:]]), "token_logprobs.0: Input should be a valid number"),
        (
            lambda a: _first(a, token_ids=[10**9], logprobs={"token_logprobs": [-1]}),
            "token id 1000000000, exp",
        ),
        (lambda a: _first(a, token_ids=[-1], logprobs={"token_logprobs": [-1]}), "token id -1, expected one below"),
        (lambda a: _first(a, token_ids=[10**40], logprobs={"token_logprobs": [-1]}), "expected one below"),
        (lambda a: _first(a, token_ids=[True]), "token_ids.0: Input should be a valid integer"),
        (
            lambda a: _first(a, token_ids=[5] * 99, logprobs={"token_logprobs": [-1] * 99}),
            "has 99 tokens, expected 1",
        ),
        (lambda a: _first(a, prompt_token_ids=[1, 2]), "prompt_token_ids is another prompt than was sent"),
        (lambda a: _first(a, finish_reason="abort"), "finish_reason is 'abort', expected"),
        (lambda a: _first(a, token_ids=[65], logprobs={"token_logprobs": [-1]}, finish_reason="stop"), "no end token"),
        (lambda a: _first(a, token_ids=[65], logprobs={"token_logprobs": [-1]}, finish_reason="length"), "was cut off"),
        (lambda a: _first(a, index=7), "choices.index does not count"),
        (lambda a: a | {"choices": a["choices"][:2]}, "choices.index does not count|gave 2 responses, expected 3"),
        (lambda a: a | {"model": "another"}, "model is 'another', expected 'toy'"),
        (lambda a: (200, b"<html>"), "is no answer with token ids and log-probabilities: Invalid JSON"),
        (lambda a: (200, b"[" * 100_000), "is no answer with token ids"),
        (lambda a: (200, b"{}" + b" " * (3 << 20)), "has more than max_bytes="),
        (lambda a: (404, b'{"error": {"message": "no such model"}}'), "HTTP 404: no such model"),
        (lambda a: (302, b"", {"location": "http://elsewhere"}), "a redirect to 'http://elsewhere' is not followed"),
    ],
)
def test_answers_that_cannot_be(
    server: PolicyServer, connect: Callable, tmp_path: Path, change: Callable, message: str
) -> None:
    """One line that names the problem's place and the field; nothing of the chunk is written."""
    backend = connect()
    server.change = lambda answer, body: change(answer) if body["prompt"] != prompt else answer
    prompt = [1]
    with pytest.raises(GradstoreError, match=message) as wrong:
        rollout(PROBLEMS, backend, REWARD, tmp_path / "r.jsonl", names={"p0": "file, line 1"}, **SHORT)
    assert "\n" not in str(wrong.value)
    assert str(wrong.value).startswith(("file, line 1", "problem 'p"))
    assert not (tmp_path / "r.jsonl").exists() or not (tmp_path / "r.jsonl").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"output_ids": [1]}, "output_ids are other tokens than those"),
        (lambda a: a | {"meta_info": {"finish_reason": {"type": "stop"}}}, "output_token_logprobs is missing"),
        (
            lambda a: a | {"meta_info": a["meta_info"] | {"finish_reason": {"type": "abort"}}},
            "finish_reason is 'abort'",
        ),
        (lambda a: [a, a], "gave 2 responses, expected 1"),
        (lambda a: {"choices": []}, "meta_info: Field required"),
    ],
)
def test_answers_of_sglang_that_cannot_be(
    server: PolicyServer, connect: Callable, change: Callable, message: str
) -> None:
    server.change = lambda answer, body: change(answer)
    with pytest.raises(GradstoreError, match=message):
        connect(server_api="sglang")


def test_at_once_and_before_anything_is_sampled(server: PolicyServer, connect: Callable) -> None:
    """A server without ids or log-probabilities is refused after one request of one token."""
    server.change = lambda answer, body: _first(answer, logprobs=None)
    with pytest.raises(GradstoreError, match=r"the server at http://127\S+: its answer: choices.0.logprobs is missing"):
        connect()
    assert [body.get("max_tokens") for body in server.requests] == [None, 1]


def test_ids_of_earlier_servers(server: PolicyServer, connect: Callable, tmp_path: Path) -> None:
    """vLLM before 0.10.2 names ids in `tokens`."""
    server.change = lambda answer, body: (
        answer | {"choices": [choice | {"token_ids": None, "prompt_token_ids": None} for choice in answer["choices"]]}
    )
    rollout(PROBLEMS, connect(), REWARD, tmp_path / "a.jsonl", **SHORT)
    server.change = lambda answer, body: answer
    rollout(PROBLEMS, connect(), REWARD, tmp_path / "b.jsonl", **SHORT)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize("fault", ["counts_temperature", "counts_cuts"])
def test_logprobs_after_temperature(server: PolicyServer, connect: Callable, tmp_path: Path, fault: str) -> None:
    """They are not the policy's: importance weights made of them would be wrong. At temperature 1 they are."""
    setattr(server, fault, True)
    backend = connect()
    rollout(PROBLEMS, backend, REWARD, tmp_path / "one.jsonl", **SHORT)
    with pytest.raises(RequestError, match="--logprobs-mode raw_logprobs"):
        rollout(PROBLEMS, backend, REWARD, tmp_path / "other.jsonl", temperature=0.5, **SHORT)


def test_the_served_model(server: PolicyServer, connect: Callable) -> None:
    server.models["data"].append({"id": "adapter"})
    with pytest.raises(RequestError, match="serves 'toy', 'adapter': give --served-model"):
        connect()
    with pytest.raises(RequestError, match="does not serve 'other', but 'toy', 'adapter'"):
        connect(served_model="other")
    assert connect(served_model="adapter").settings()["served_model"] == "adapter"
    assert server.requests[-1]["model"] == "adapter"
    server.models = {"data": [{"id": "x" * 501}]}
    with pytest.raises(RequestError, match="a model whose name cannot be kept"):
        connect()
    server.models = {"data": []}
    with pytest.raises(RequestError, match="serves no model"):
        connect()


def test_the_context_is_the_servers(server: PolicyServer, connect: Callable, tmp_path: Path) -> None:
    server.models["data"][0]["max_model_len"] = 14
    with pytest.raises(RequestError, match="do not fit in the model's context of 14"):
        rollout(PROBLEMS, connect(), REWARD, tmp_path / "r.jsonl", **SHORT)


def test_keys_are_neither_shown_nor_kept(
    server: PolicyServer, connect: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    key = "sk-a-secret-of-this-test-123456"
    monkeypatch.setenv("GRADSTORE_SERVER_KEY", key)
    backend = connect()
    rollout(PROBLEMS, backend, REWARD, tmp_path / "r.jsonl", **SHORT)
    assert server.headers[-1]["Authorization"] == f"Bearer {key}"
    assert all(key not in path.read_text() for path in tmp_path.iterdir())
    for change in (lambda answer, body: answer | {"model": key}, lambda answer, body: (400, key.encode())):
        server.change = change
        with pytest.raises(GradstoreError) as wrong:
            rollout(PROBLEMS, backend, REWARD, tmp_path / "other.jsonl", **SHORT)
        assert key not in str(wrong.value)
        (tmp_path / "other.jsonl").unlink(missing_ok=True)
        (tmp_path / "other.jsonl.settings.json").unlink()
    server.models = {"data": [{"id": key}]}
    with pytest.raises(RequestError, match="a model whose name cannot be kept"):
        connect()
    assert key not in caplog.text
    with pytest.raises(RequestError, match="--server is no address"):
        connect(server="localhost:8000")
    with pytest.raises(GradstoreError, match=r"the server at http://\*\*\*@127.0.0.1:1: cannot be reached"):
        connect(server="http://user:password@127.0.0.1:1/v1", retries=0)


def _cli(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["gradstore", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
        raise SystemExit(0)
    return int(stop.value.code or 0), capsys.readouterr().err


def test_from_the_command_line(
    server: PolicyServer, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As with other back ends, shards too; what is another back end's is refused."""
    problems, out = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    problems.write_text("".join(json.dumps(one) + "\n" for one in PROBLEMS))
    common = ("rollout", problems, "--model", model_folder, "--reward", "math", "-n", 2, "--max-new-tokens", 4)
    served = ("--server", server.url, "--policy-version", "v7", "--as-text")
    for index in range(2):
        name = tmp_path / f"{index}.jsonl"
        status, err = _cli(monkeypatch, capsys, *common, *served, "--out", name, "--shard", f"{index}/2")
        assert status == 0, err
    ids = [json.loads(line)["problem_id"] for index in range(2) for line in (tmp_path / f"{index}.jsonl").open()]
    assert sorted(ids) == sorted(2 * [one["id"] for one in PROBLEMS])
    status, err = _cli(monkeypatch, capsys, *common, "--server", server.url, "--out", out)
    assert status == 2
    assert "--policy-version NAME" in err
    status, err = _cli(monkeypatch, capsys, *common, *served, "--out", out, "--backend", "vllm")
    assert status == 2
    assert "only for --backend server" in err
    status, err = _cli(monkeypatch, capsys, *common, *served, "--out", out, "--ray", "local")
    assert status == 2
    assert "--ray is for models of its own" in err
    status, err = _cli(monkeypatch, capsys, *common, *served, "--out", out, "--device", "cpu")
    assert status == 2
    assert "--device: only for --backend transformers" in err
    status, err = _cli(monkeypatch, capsys, *common, *served, "--out", out, "--server-api", "tgi")
    assert status == 2
    assert "server_api 'tgi' is not one of vllm, sglang" in err
    server.change = lambda answer, body: _first(answer, logprobs=None)
    status, err = _cli(monkeypatch, capsys, *common, *served, "--out", out)
    assert status == 1
    assert "choices.0.logprobs is missing" in err
    assert err.count("\n") == 1
    assert not out.exists()
