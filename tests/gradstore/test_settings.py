"""Settings read by name: each value gets its field's type, each mistake one line that says where it is."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.engine.gradients.objectives import PRESETS, Objective
from gradstore.engine.selecting.diversity import Diversity
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.errors import RequestError
from gradstore.settings import (
    Aliases,
    arguments,
    build,
    check,
    differences,
    merge,
    parse,
    plain,
    read,
    read_yaml,
    spelled,
    write_yaml,
)
from gradstore.trainer.local.settings import UpdateSettings
from gradstore.trainer.round.settings import GRADALIGN_NAMES, RoundSettings
from gradstore.trainer.sampling.judge import JudgeSettings


@dataclass(frozen=True, slots=True)
class Inner:
    ALIASES: ClassVar[Aliases] = {"colour": "color"}
    color: Literal["red", "blue"] = "red"
    size: int = 1
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RequestError(f"size is {self.size}, expected at least 1")


@dataclass(frozen=True, slots=True)
class Outer:
    ALIASES: ClassVar[Aliases] = {"size": "inner.size", "every": "1/share", "file": "path"}
    path: Path
    name: str | None = None
    count: Literal["all"] | int = "all"
    share: float = 0.5
    on: bool = False
    shares: Mapping[str, float] | None = None
    names: tuple[str, ...] = ()
    anything: Mapping[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(size=7))
    maybe: Inner | None = None


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"count": "12"}, {"count": 12}),
        ({"count": "all"}, {"count": "all"}),
        ({"share": "1e-3"}, {"share": 0.001}),
        ({"share": 1}, {"share": 1.0}),
        ({"every": "4"}, {"share": 0.25}),
        ({"every": 0}, {"share": 0.0}),
        ({"on": "true"}, {"on": True}),
        ({"on": False}, {"on": False}),
        ({"name": "null"}, {"name": "null"}),
        ({"name": None, "share": None}, {}),
        ({"shares": "a=0.5,b=c=0.25"}, {"shares": {"a": 0.5, "b=c": 0.25}}),
        ({"shares": {"a": "0.5"}}, {"shares": {"a": 0.5}}),
        ({"shares": "null"}, {"shares": None}),
        ({"names": "a,b"}, {"names": ("a,b",)}),
        ({"names": "[a, b]"}, {"names": ("a", "b")}),
        ({"names": ["a", "b"]}, {"names": ("a", "b")}),
        ({"anything": '{"deep": [1, {"x": null}]}'}, {"anything": {"deep": [1, {"x": None}]}}),
        ({"inner": {"color": "blue"}}, {"inner": Inner("blue", 7)}),
        ({"inner": "blue,size=3"}, {"inner": Inner("blue", 3)}),
        ({"inner": "{size: 3, pair: [1, 2.5]}"}, {"inner": Inner("red", 3, (1.0, 2.5))}),
        ({"inner.size": "3", "inner.colour": "blue"}, {"inner": Inner("blue", 3)}),
        ({"inner": {"colour": "blue"}, "size": 3}, {"inner": Inner("blue", 3)}),
        ({"inner": Inner("blue")}, {"inner": Inner("blue")}),
        ({"maybe": {}}, {"maybe": Inner()}),
        ({"maybe.size": 4}, {"maybe": Inner(size=4)}),
        ({"maybe": None}, {"maybe": None}),
        ({"size": None}, {}),
    ],
)
def test_values_get_their_type(values: dict, wanted: dict) -> None:
    """A text as on a command line, a value as in YAML; of a nested dataclass, what is left out keeps its place's
    default."""
    assert read(Outer, {"path": "a/b", **values}, "x: ") == Outer(Path("a/b"), **wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 3}, "run.yaml: cuont is not known; did you mean 'count'?"),
        ({"evry": 3}, "run.yaml: evry is not known; did you mean 'every'?"),
        ({"pair": [1, 2]}, "run.yaml: pair is not known; did you mean 'inner.pair'?"),
        ({"zzz": 3}, "run.yaml: zzz is not known, expected one of path, name, count,"),
        ({3: 3}, "run.yaml: 3 is not known"),
        ({"inner": {"sise": 3}}, "run.yaml: inner.sise is not known; did you mean 'size'?"),
        ({"inner.sise": 3}, "run.yaml: inner.sise is not known; did you mean 'size'?"),
        ({"count": "some"}, "run.yaml: count is 'some', expected `all` or a whole number"),
        ({"count": 2.5}, "run.yaml: count is 2.5, expected `all` or a whole number"),
        ({"count": True}, "run.yaml: count is True, expected `all` or a whole number"),
        ({"share": "much"}, "run.yaml: share (1/every) is 'much', expected a number"),
        ({"share": "nan"}, "run.yaml: share (1/every) is 'nan', expected a number"),
        ({"share": float("inf")}, "run.yaml: share (1/every) is inf, expected a number"),
        ({"every": "often"}, "run.yaml: share (1/every) is 'often', expected a number"),
        ({"on": 1}, "run.yaml: on is 1, expected true or false"),
        ({"name": 3}, "run.yaml: name is 3, expected a text"),
        ({"path": 3}, "run.yaml: path (file) is 3, expected a path"),
        ({"shares": {"a": "x"}}, "run.yaml: shares.a is 'x', expected a number"),
        ({"shares": "a"}, "run.yaml: shares: 'a' is not NAME=VALUE,NAME=VALUE with each name once"),
        ({"shares": "a=1,a=2"}, "run.yaml: shares: 'a=1,a=2' is not NAME=VALUE"),
        ({"shares": 3}, "run.yaml: shares is 3, expected values by name (each a number)"),
        ({"names": 3}, "run.yaml: names is 3, expected a list (each item a text)"),
        ({"inner": {"color": "green"}}, "run.yaml: inner.color (colour) is 'green', expected one of red, blue"),
        ({"inner": {"pair": [1]}}, "run.yaml: inner.pair is [1], expected a list (each item a number)"),
        ({"inner": "{size: [}"}, "run.yaml: inner: line 1: "),
        ({"inner": 3}, "run.yaml: inner is 3, expected settings by name (color, size, pair)"),
        ({"inner": {"size": 0}}, "run.yaml: inner: size is 0, expected at least 1"),
        ({"inner": {"color": "red", "colour": "red"}}, "run.yaml: inner: 'color' and 'colour' are the same; give one"),
        ({"inner": {"size": 3}, "size": 3}, "run.yaml: 'inner' and 'size' both give inner.size; give it once"),
        ({"inner": Inner(), "size": 3}, "run.yaml: 'inner' and 'size' are the same; give one"),
        ({"file": "a"}, "run.yaml: 'path' and 'file' are the same; give one"),
        ({"path": None}, "run.yaml: path is missing"),
    ],
)
def test_mistakes_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        read(Outer, {"path": "a", **values}, "run.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_node_in_front() -> None:
    """`gradstore.spec.rnk` is what a user of verl typed."""
    with pytest.raises(RequestError, match=r"^gradstore\.inner\.sise is not known; did you mean 'size'\?$"):
        read(Outer, {"path": "a", "inner": {"sise": 3}}, "gradstore.")
    with pytest.raises(RequestError, match=r"^gradstore\.inner: size is 0"):
        read(Outer, {"path": "a", "inner": {"size": 0}}, "gradstore.")
    with pytest.raises(RequestError, match=r"^gradstore\.path is missing$"):
        read(Outer, {}, "gradstore.")
    with pytest.raises(RequestError, match=r"^gradstore\.stoer is not known; did you mean 'store'\?$"):
        parse(Outer, {"stoer": 1}, "gradstore.", also=["store"])


def test_missing_ones_come_first_and_together() -> None:
    @dataclass(frozen=True)
    class Two:
        one: int
        two: int
        inner: Inner

    with pytest.raises(RequestError, match=r"^x: one, two are missing$"):
        read(Two, {"inner": {"size": 0}}, "x: ")


def test_checked_without_names() -> None:
    """Python checks no types; a budget of 2.5 problems would be an error only after hours, or none."""
    check(Outer(Path("a"), maybe=Inner(), names=("a",), share=1))
    for changes, message in (
        ({"count": 2.5}, "count is 2.5, expected `all` or a whole number"),
        ({"share": "0.5"}, r"share \(1/every\) is '0.5', expected a number"),
        ({"inner": None}, "inner is None, expected Inner"),
    ):
        with pytest.raises(RequestError, match=message):
            check(replace(Outer(Path("a")), **changes))
    with pytest.raises(RequestError, match=r"refresh is 2\.5, expected `all` or a whole number"):
        RoundSettings(selected=128, refresh=2.5)  # type: ignore[arg-type]


def test_names_in_messages() -> None:
    assert spelled(Outer, "share") == "share (1/every)"
    assert spelled(Outer, "path") == "path (file)"
    assert spelled(Outer, "count") == "count"


def test_one_over_the_other() -> None:
    """The command line wins over a file, field by field; a mapping is one value."""
    low = parse(Outer, {"path": "a", "inner": {"size": 3, "color": "blue"}, "shares": {"a": 1}}, "")
    high = parse(Outer, {"size": "4", "shares": "b=0.5", "on": "true"}, "")
    merged = build(Outer, merge(Outer, low, high), "")
    assert merged == Outer(Path("a"), inner=Inner("blue", 4), shares={"b": 0.5}, on=True)
    assert build(Outer, merge(Outer, high, low), "").inner.size == 3


def test_arguments() -> None:
    assert arguments(["a=1", "b=c=d"]) == {"a": "1", "b": "c=d"}
    for texts, message in ((["a"], "no option"), (["--a=1"], "no option"), (["a=1", "a=2"], "'a' is given twice")):
        with pytest.raises(RequestError, match=message):
            arguments(texts)


def test_differences() -> None:
    """A resumed run is compared by these."""
    one = Outer(Path("a"), shares={"x": 1.0})
    assert differences(one, one) == {}
    other = replace(one, inner=Inner(size=8), maybe=Inner(), shares={"y": 1.0})
    assert differences(one, other) == {
        "shares.x": (1.0, None),
        "inner.size": (7, 8),
        "shares.y": (None, 1.0),
        "maybe.color": (None, "red"),
        "maybe.size": (None, 1),
        "maybe.pair": (None, [0.0, 1.0]),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\nb: 2\n", "is not YAML: line 2: "),
        ("a: 1\nb: 2\na: 3\n", "is not YAML: line 3: 'a' is given twice"),
        ("x: {a: 1, a: 1}\n", "is not YAML: line 1: 'a' is given twice"),
        ("a: !!python/object:os.system {}\n", "is not YAML: line 1: could not determine a constructor"),
        ("- 1\n", "holds no settings, expected lines of NAME: VALUE"),
        ("", "holds no settings"),
        ("\tx: 1", "is not YAML: line 1: "),
        ("a: \x00", "is not YAML: "),
        ("[" * 100_000, "is not YAML: line 1: nested more than 50 deep"),
        ("a: &x [1]\nb: *x\n", "is not YAML: line 2: *x: references are not taken"),
        ("{[1]: 2}", "is not YAML: line 1: "),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=re.escape(f"{path}: {message}")) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"a: \xff\xfe")
    for name, message in {"none.yaml": "the file does not exist", ".": "Is a directory", "bytes": "not UTF-8"}.items():
        with pytest.raises(RequestError, match=message):
            read_yaml(tmp_path / name)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0.001, 0.999)
objectives = st.builds(
    Objective,
    advantage=st.sampled_from(["mean", "mean_std", "rloo"]),
    importance=st.just(True),
    clip_low=st.none() | st.floats(0, 1e300),
    ratio=st.sampled_from(["token", "sequence", "product"]),
    temperature=st.floats(1e-3, 1e6),
    kl_beta=st.floats(1e-300, 1e300),
    reference=st.none() | texts,
)
specs = st.builds(
    SketchSpec,
    rank=st.integers(1, 1 << 40),
    seed=st.integers(),
    basis=st.sampled_from(["random", "fitted", "dense"]),
    modules=st.none() | st.lists(texts.map(re.escape), min_size=1).map(tuple),
    objective=objectives | st.sampled_from(list(PRESETS.values())),
    token_budget=st.none() | st.integers(1),
)
rounds = st.builds(
    RoundSettings,
    selected=st.integers(1, 9).map(lambda n: 2**n),
    train_batch=st.just(1024),
    refresh=st.just("all") | st.integers(0),
    refresh_first=st.none() | st.just("all") | st.integers(0),
    temperature=st.none() | numbers,
    quotas=st.none() | st.dictionaries(texts, shares),
    diversity=st.none() | st.builds(Diversity, method=st.sampled_from(["mmr", "kmeans"]), relevance=shares),
    observe=st.sampled_from(["last", "all", "none"]),
    confidence=shares,
    once=st.booleans(),
    spec=specs,
)
judges = st.builds(
    JudgeSettings,
    model=texts.filter(bool),
    base_url=st.none() | texts,
    timeout=st.floats(1e-9, 1e9),
    temperature=st.floats(0, 1e9),
    cache=st.none() | texts,
)


@settings(deadline=None, max_examples=60)
@given(rounds | judges | specs)
def test_yaml_and_back(tmp_path_factory: pytest.TempPathFactory, wanted: Any) -> None:
    """Written and read, settings are the same: texts that look like numbers, null or lists, and every float's bits."""
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    write_yaml(path, wanted)
    assert read(type(wanted), read_yaml(path), "x: ") == wanted
    assert read(type(wanted), plain(wanted), "x: ") == wanted


@settings(deadline=None, max_examples=60)
@given(rounds | judges)
def test_texts_and_back(wanted: Any) -> None:
    """What stands in NAME=VALUE is read as the value: numbers, switches, `all`, `null`."""
    simple = {
        name: "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value).strip("'")
        for name, value in plain(wanted).items()
        if isinstance(value, bool | int | float) or value in (None, "all", "last", "none", "mean", "cosine")
    }
    optional_texts = {"base_url", "cache", "template", "rollout_rule"}  # `null` is a text there
    kept = {name: value for name, value in simple.items() if name not in optional_texts}
    others = {name: value for name, value in plain(wanted).items() if name not in kept}
    assert read(type(wanted), {**kept, **others}, "x: ") == wanted


def test_gradaligns_names_reach_every_field() -> None:
    """An alias of a field that was renamed would be refused as unknown."""
    known = {own.name for own in fields(RoundSettings)}
    assert {target.removeprefix("1/") for target in GRADALIGN_NAMES.values()} <= known


def test_reading_stays_light() -> None:
    """`gradstore --help` does not wait for pydantic."""
    code = "import gradstore.settings, gradstore.cli, sys; print([n for n in ('pydantic', 'yaml') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_preset_can_be_changed_where_it_is_named() -> None:
    """The command line has one text for an objective; a preset whose bounds stay could not be tuned."""

    def update(text: Any) -> Objective:
        return read(UpdateSettings, {"objective": text}, "").objective

    assert update("gspo") == PRESETS["gspo"]
    assert update("dapo,clip_high=0.3, ratio_cap=3") == replace(PRESETS["dapo"], clip_high=0.3, ratio_cap=3.0)
    assert update("importance=true,clip_low=0.1") == replace(PRESETS["grpo"], importance=True, clip_low=0.1)
    for text, message in (
        ("gspo,clip_hi=0.3", "clip_hi is not known; did you mean 'clip_high'"),
        ("gpso", "objective 'gpso' is not one of .*; did you mean 'gspo'"),
        ("gspo,dapo", "'dapo' is no option and no setting"),
        ("grpo,clip_high=0.3", "clip_high needs importance=True"),
        ("cispo,clip_high=null", "needs clip_high"),
    ):
        with pytest.raises(RequestError, match=message):
            update(text)
