"""Messages reach the model whole: what a template cannot render is refused, never dropped or printed as Python."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from gradstore import RequestError
from gradstore.engine.rollouts import read_rollouts
from gradstore.engine.rollouts.templates import (
    check_arguments,
    kept_arguments,
    prompt_text,
    settings_path,
    takes_parts,
    tools_of,
)
from gradstore.engine.rollouts.tokens import text_of

TURN = "{% if add_generation_prompt %}>{% endif %}"
PRINTS = "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}" + TURN
ADDS = "{% for m in messages %}{{ '[' + m['role'] + ':' + m['content'] + ']' }}{% endfor %}" + TURN
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}:{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] is not none %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}]{% endfor %}"
    + TURN
)
CALLS = (
    "{% if tools %}<{% for t in tools %}{{ t['name'] }}{% endfor %}>{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}:{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}({{ c['name'] }}){% endfor %}]{% endfor %}" + TURN
)
THINKS = ADDS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
ALL = {"prints": PRINTS, "adds": ADDS, "parts": PARTS, "calls": CALLS, "thinks": THINKS}
CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "calc"}]},
    {"role": "tool", "content": "3"},
]


@pytest.fixture
def templated(tiny_tokenizer: Any) -> Any:
    """templated(template) -> a tokenizer with it."""

    def made(template: str | None) -> Any:
        tokenizer = copy.copy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return made


def _user(*texts: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


@pytest.mark.parametrize("name", ALL)
def test_one_text_part_reads_as_the_text(templated: Any, name: str) -> None:
    """Not as the repr of a list, which is what a template that prints its content makes of one."""
    tokenizer = templated(ALL[name])
    expected = prompt_text(tokenizer, [{"role": "user", "content": "hi"}], "p")
    assert expected == "[user:hi]>"
    assert prompt_text(tokenizer, _user("hi"), "p") == expected
    with_nulls = [{"role": "user", "content": [{"type": "text", "text": "hi", "image": None}], "tool_calls": None}]
    assert prompt_text(tokenizer, with_nulls, "p") == expected
    assert prompt_text(tokenizer, [{"role": "user", "content": ["hi"]}], "p") == expected
    assert takes_parts(tokenizer) == (name == "parts")


def test_several_parts(templated: Any) -> None:
    """A template that takes parts decides how they follow each other; others get them on lines of their own."""
    assert prompt_text(templated(PARTS), _user("a", "b"), "p") == "[user:ab]>"
    assert prompt_text(templated(ADDS), _user("a", "b"), "p") == "[user:a\nb]>"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"content": [{"type": "image", "image": "x"}]}, "message 0 has a part of type 'image'"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "message 0 has a part of type 'image_url'"),
        ({"content": [{"type": "text", "text": 3}]}, "message 0 has a part of type 'text'"),
        ({"content": [3]}, "message 0 has a part of type 'int'"),
        ({"content": None}, "message 0 has no content and calls no tool"),
        ({"content": {"text": "x"}}, "message 0 has content of type dict"),
    ],
)
@pytest.mark.parametrize("template", [ADDS, PARTS])
def test_what_is_no_text_is_refused(templated: Any, template: str, message: dict, told: str) -> None:
    """A picture's place in the prompt without the picture is another problem."""
    with pytest.raises(RequestError, match="here: " + told):
        prompt_text(templated(template), [{"role": "user", **message}], "here")


def test_null_content_of_a_tool_call(templated: Any) -> None:
    """Rendered where the template renders calls, whether it knows null or not; refused where the call would be lost."""
    assert prompt_text(templated(CALLS), CALL, "p") == "[user:u][assistant:(calc)][tool:3]>"
    knows_no_null = CALLS.replace("{% if m['content'] %}{{ m['content'] }}{% endif %}", "{{ m['content'] }}")
    assert prompt_text(templated(knows_no_null), CALL, "p") == "[user:u][assistant:(calc)][tool:3]>"
    adds = knows_no_null.replace("{{ m['content'] }}", "{{ '' + m['content'] }}")
    assert prompt_text(templated(adds), CALL, "p") == "[user:u][assistant:(calc)][tool:3]>"
    said = copy.deepcopy(CALL)
    said[0]["content"] = "None"
    assert prompt_text(templated(knows_no_null), said, "p") == "[user:None][assistant:(calc)][tool:3]>"
    for template in (ADDS, PRINTS, PARTS):
        with pytest.raises(RequestError, match="p: message 1 calls tools, which the chat template leaves out"):
            prompt_text(templated(template), CALL, "p")


def test_tools(templated: Any) -> None:
    """A problem's tools are part of what the model is asked."""
    tools, messages = [{"name": "calc"}], [{"role": "user", "content": "u"}]
    assert prompt_text(templated(CALLS), messages, "p", tools=tools) == "<calc>[user:u]>"
    with pytest.raises(RequestError, match="p: the problem has tools, which the chat template leaves out"):
        prompt_text(templated(ADDS), messages, "p", tools=tools)
    assert prompt_text(templated(ADDS), "text", "p", tools=tools) == "text"


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [{"name": "calc", "x": None}]},
        {"tools": '[{"name": "calc"}]'},
        {"verl": {"tools": [{"name": "calc"}]}},
        {"verl": {"extra_info": {"tools": [{"name": "calc"}]}}},
    ],
)
def test_where_tools_stand(extra: dict) -> None:
    assert tools_of({"extra": extra}, "p") == [{"name": "calc"}]


@pytest.mark.parametrize("tools", ["{", [1], {"name": "calc"}, '["a"]'])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(RequestError, match="p: field 'tools'"):
        tools_of({"extra": {"tools": tools}}, "p")
    assert tools_of({"extra": {}}, "p") is None
    assert tools_of({"extra": {"tools": []}}, "p") is None


@pytest.mark.parametrize("raises", ["{{ raise_exception('no system') }}", "{{ 1 + 'a' }}", "{{ messages[9].x.y }}"])
def test_a_template_that_raises_is_one_line(templated: Any, raises: str) -> None:
    """Templates raise what they like: a traceback from Jinja names neither file nor row."""
    with pytest.raises(RequestError, match=r"here: the chat template refuses the prompt's messages: ") as refused:
        prompt_text(templated(raises), [{"role": "user", "content": "a"}], "here")
    assert "\n" not in str(refused.value)
    with pytest.raises(RequestError, match=r"\(message 0: the content is not text\)"):
        prompt_text(templated(PARTS + raises), [{"role": "assistant", "content": None, "tool_calls": [1]}], "here")


def test_arguments(templated: Any) -> None:
    """They change the prompt; one that the template does not know is refused, as it would change nothing."""
    tokenizer, messages = templated(THINKS), [{"role": "user", "content": "u"}]
    check_arguments(tokenizer, {"enable_thinking": False})
    assert prompt_text(tokenizer, messages, "p", arguments={"enable_thinking": False}) == "[user:u]><think></think>"
    assert prompt_text(tokenizer, messages, "p", arguments={"enable_thinking": True}) == "[user:u]>"
    for name, told in (("enable_thinkin_", "no argument"), ("tokenize", "cannot be set"), ("tools", "cannot be set")):
        with pytest.raises(RequestError, match=f"argument '{name}'.*|{told}"):
            check_arguments(tokenizer, {name: 1})
    with pytest.raises(RequestError, match="no argument 'enable_thinking'"):
        check_arguments(templated(None), {"enable_thinking": False})
    check_arguments(templated(None), {})


def test_arguments_are_kept_with_the_rollouts(tmp_path: Path, templated: Any) -> None:
    """A file read again is rendered as it was sampled; other arguments than those are refused."""
    tokenizer, path = templated(THINKS), tmp_path / "r.jsonl"
    row = {"problem_id": "p", "prompt": [{"role": "user", "content": "u"}], "response": "r", "reward": 1}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    without, off = "[user:u]>", {"enable_thinking": False}

    def prompt(**options: Any) -> str:
        (group,) = read_rollouts(path, tokenizer=tokenizer, **options).groups()
        return tokenizer.decode(group.prompt_ids)

    assert prompt() == without
    assert prompt(template_kwargs=off) == without + "<think></think>"
    settings_path(path).write_text(json.dumps({"template_kwargs": off}), encoding="utf-8")
    assert prompt() == prompt(template_kwargs=off) == without + "<think></think>"
    with pytest.raises(RequestError, match=r'sampled with the template arguments {"enable_thinking": false}, given'):
        prompt(template_kwargs={})
    settings_path(path).write_text("{}", encoding="utf-8")
    with pytest.raises(RequestError, match=r"sampled with the template arguments \{\}, given"):
        prompt(template_kwargs=off)
    settings_path(path).write_text("[nonsense", encoding="utf-8")
    assert kept_arguments(path, off) == off


def test_a_dump_finds_its_problems_under_the_arguments(tmp_path: Path, templated: Any) -> None:
    """verl's dump has the rendered text alone: which problem it was shows only when rendered the same way."""
    tokenizer, path = templated(CALLS + "{{ mode }}"), tmp_path / "dump.jsonl"
    problems = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"u{i}"}]} for i in range(2)]
    problems[1]["extra"] = {"tools": [{"name": "calc"}]}
    texts = ["[user:u0]>slow", "<calc>[user:u1]>slow"]
    rows = [{"input": text, "output": "a", "score": 1.0, "step": 1} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = read_rollouts(path, tokenizer=tokenizer, problems=problems, template_kwargs={"mode": "slow"})
    assert source.problem_ids == ["p0", "p1"]
    assert [tokenizer.decode(group.prompt_ids) for group in source.groups()] == texts
    with pytest.raises(RequestError, match=r"dump.jsonl, line 1: no problem given has .* the chat template renders"):
        read_rollouts(path, tokenizer=tokenizer, problems=problems)


def test_text_of_ids_that_no_tokenizer_knows(tiny_tokenizer: Any) -> None:
    """A model samples ids of its padded vocabulary; their text is nothing, not an error."""

    class Strict:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join("abc"[i] for i in ids)

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 2}

    assert text_of(Strict(), [0, 7, 2]) == "ac"
    ids = tiny_tokenizer("hé")["input_ids"]
    assert text_of(tiny_tokenizer, [*ids, 260, 151_935]) == "hé"
    assert text_of(tiny_tokenizer, [*ids, 1 << 40]) == "hé"
    assert text_of(tiny_tokenizer, []) == ""
