"""The explorer: what it answers is what the store holds, and who may ask.

Dimension letters: P problems, D sketch dimensions.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import gradstore
from gradstore import State, Store
from gradstore.analysis.explorer import problem
from gradstore.analysis.explorer.access import Access, is_loopback, new_token
from gradstore.analysis.explorer.app import make_app
from gradstore.analysis.explorer.catalogue import Catalogue, Filter
from gradstore.analysis.report.transcripts import Transcript
from gradstore.errors import RequestError


@pytest.fixture
def catalogue(history: Any) -> Catalogue:
    """Over the planted history: four steps, some rows stale, some without signal, one failed, one never measured."""
    return Catalogue(gradstore.open(history.store.path), "pool", ("bench",))


# What it answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 0, 10, 25, 30])
def test_scores_are_those_of_each_problem(catalogue: Catalogue, history: Any, step: int | None) -> None:
    """One problem at a time against the planted gradients; whatever has no gradient has no score."""
    frame = catalogue.scored("bench", step, "cosine").set_index("id")
    s = 3 if step is None else int(np.searchsorted(history.steps, step, side="right")) - 1
    assert len(frame) == len(history.ids)
    for p, name in enumerate(history.ids):
        rows = [t for t in range(s + 1) if history.measured_SP[t, p]]
        line = frame.loc[name]
        if not rows:
            assert line["state"] == "unmeasured"
            assert np.isnan(line["score"])
            continue
        state = State(int(history.states_SP[rows[-1], p])).name.lower()
        assert line["state"] == state
        assert line["age"] == (history.steps[3] if step is None else step) - history.steps[rows[-1]]
        assert line["pass_rate"] == pytest.approx(history.rates_SP[rows[-1], p])
        if state == "live":
            assert line["score"] == pytest.approx(history.cosine(s, p), abs=1e-4)
        else:
            assert np.isnan(line["score"])


def test_filters_and_search_are_a_loop(trained: Catalogue) -> None:
    """Every filter at once against the records, one by one; the rest is ranked, what has no score last."""
    records = {record["id"]: record for record in trained.store.records("pool")}
    view = trained.store.view("pool")
    rates = dict(zip(view.ids, view.pass_rates.tolist(), strict=True))
    wanted = Filter(sources=("products", "chain_sum"), tags=("clean",), pass_rate=(0.2, 0.9), text="FINAL")
    frame = trained.ranked("sums", None, "cosine", wanted)
    expected = {
        name
        for name, record in records.items()
        if record["source"] in wanted.sources
        and "clean" in record["tags"]
        and 0.2 <= rates[name] <= 0.9
        and "final" in record["prompt"][0]["content"].lower()
    }
    assert set(frame["id"]) == expected
    assert expected
    scores = frame["score"].to_numpy()
    known = scores[np.isfinite(scores)]
    assert (np.diff(known) <= 0).all()
    assert np.isfinite(scores[: len(known)]).all()
    worst = trained.ranked("sums", None, "cosine", wanted, largest=False)["score"].to_numpy()
    assert worst[: len(known)].tolist() == sorted(known)
    assert set(trained.ranked("sums", None, "cosine", Filter(states=("no_signal",)))["state"]) == {"no_signal"}
    assert len(trained.ranked("sums", None, "cosine", Filter(text="no such text"))) == 0
    assert trained.ranked("sums", None, "cosine", Filter(text="chain_sum-0003"))["id"].tolist() == ["chain_sum-0003"]


def test_nearest_are_those_with_the_largest_cosine(trained: Catalogue) -> None:
    view = trained.store.view("pool", 0)
    live = np.flatnonzero(view.live)
    rows = view.rows(live).astype(float)
    name = str(view.ids[live[0]])
    query = rows[0] / np.linalg.norm(rows[0])
    cosines = {str(view.ids[place]): float(row @ query) for place, row in zip(live[1:], rows[1:], strict=True)}
    best = sorted(cosines, key=lambda other: -cosines[other])[:5]
    frame = trained.nearest(name, 0, 5)
    assert name not in set(frame["id"])
    assert frame["cosine"].tolist() == pytest.approx([cosines[other] for other in best], abs=5e-3)
    silent = str(view.ids[view.states == State.NO_SIGNAL][0])
    assert trained.nearest(silent, 0).empty


def test_two_rankings_side_by_side(trained: Catalogue) -> None:
    """Against ranks counted by hand and scipy's Spearman."""
    from scipy.stats import spearmanr

    found = trained.compare(("sums", 0), ("sums", 8), "cosine")
    a, b = (trained.scored("sums", step, "cosine").set_index("id")["score"] for step in (0, 8))
    both = [name for name in a.index if np.isfinite(a[name]) and np.isfinite(b[name])]
    assert set(found.frame["id"]) == set(both)
    assert found.spearman == pytest.approx(spearmanr(a[both], b[both])[0], abs=1e-3)
    for line in found.frame.itertuples():
        assert line.left_rank == 1 + sum(
            a[name] > a[line.id] or (a[name] == a[line.id] and name < line.id) for name in both
        )
        assert line.moved == line.left_rank - line.right_rank
    assert found.only_left == sum(np.isfinite(a[name]) and not np.isfinite(b[name]) for name in a.index)
    best = [set(pd.Series({name: one[name] for name in both}).nlargest(found.k).index) for one in (a, b)]
    assert found.jaccard == pytest.approx(len(best[0] & best[1]) / len(best[0] | best[1]))


def test_history_has_every_step_and_benchmark(trained: Catalogue) -> None:
    frame = trained.history("chain_sum-0003", "cosine")
    assert list(zip(frame["step"], frame["benchmark"], strict=True)) == [
        (step, name) for step in (0, 4, 8) for name in ("sums", "spelling")
    ]
    for line in frame.itertuples():
        expected = trained.scored(line.benchmark, line.step, "cosine").set_index("id").loc["chain_sum-0003"]
        assert line.score == pytest.approx(expected["score"], abs=1e-6, nan_ok=True)
        assert line.n_rollouts == 8


def test_what_is_published_is_seen(trained: Catalogue, tmp_path: Path) -> None:
    """The explorer stays open while a trainer writes: nothing old is shown for new."""
    store = gradstore.create(tmp_path / "store", dim=4, fingerprint={"a": 1})
    for name in ("pool", "bench"):
        store.add_problems(name, [{"id": f"{name}{p}", "prompt": "p"} for p in range(4)])
    append(store, "bench", 0, np.eye(4))
    append(store, "pool", 0, np.eye(4))
    looked = Catalogue(gradstore.open(tmp_path / "store"), "pool", ("bench",))
    before = looked.scored("bench", None, "cosine")["score"].tolist()
    append(store, "pool", 1, -np.eye(4))
    assert looked.scored("bench", None, "cosine")["score"].tolist() == pytest.approx([-one for one in before])


def append(store: Store, name: str, step: int, rows: np.ndarray) -> None:
    with store.writer(name, step=step) as writer:
        writer.append([f"{name}{p}" for p in range(len(rows))], rows.astype(np.float32))


def texts_in(part: Any) -> list[str]:
    """Every text of a tree of components, in order."""
    if isinstance(part, list | tuple):
        return [text for one in part for text in texts_in(one)]
    if hasattr(part, "children"):
        return texts_in(part.children)
    return [] if part is None else [str(part)]


def test_probes_are_shown_rollout_by_rollout(history: Any) -> None:
    """Each derivative beside its reward, for the problem asked and no other."""
    store = gradstore.open(history.store.path, "a")
    first, second = history.ids[4], history.ids[5]
    lengths = [np.array([3, 4])] * 2
    derivatives, rewards = [np.array([0.5, -0.25]), np.array([9.0, 9.0])], [np.array([1.0, 0.0])] * 2
    store.probes("pool").add([first, second], derivatives, rewards, lengths, step=10, target="bench")
    texts = texts_in(problem._view(Catalogue(store, "pool", ("bench",)), first, "cosine", None, "all", "light"))
    assert "+0.500" in texts
    assert "\u22120.250" in texts
    assert "+9.000" not in texts


def test_tokens_are_coloured_by_their_share() -> None:
    """Blue for what pushes with the target, red for what pushes against it, the strongest the most."""
    one = Transcript(0, "ab", 1.0, 0, (-0.1, -0.2), (0.5, -1.0), ("a", "b"))
    _, body = problem._rollout(one).children
    colours = [span.style["backgroundColor"] for span in body.children]
    assert colours == ["rgba(43,116,201,0.38)", "rgba(179,68,108,0.75)"]
    assert [span.title for span in body.children] == ["+0.500", "\u22121.000"]
    assert "Blue tokens" in problem._legend([one])


def test_tokens_of_others_are_marked() -> None:
    """What a tool wrote must not be read as the policy's."""
    own = (True, False, False, True)
    one = Transcript(0, "abcd", 1.0, 0, (-0.1, float("nan"), -9.0, -0.2), None, ("a", "b", "c", "d"), own)
    assert one.marked == "[the policy wrote 2 of 4 tokens; \u27e6 \u27e7 mark the others]\na\u27e6bc\u27e7d"
    head, body = problem._rollout(one).children
    assert head.children.endswith("reward 1; the policy wrote 2 of 4 tokens")
    spans = body.children
    assert ["not written" in span.title for span in spans] == [False, True, True, False]
    assert "backgroundColor" not in spans[1].style
    plain = Transcript(0, "abcd", 1.0, 0, None, None, None, own)
    assert plain.marked == "[the policy wrote 2 of 4 tokens]\nabcd"
    assert Transcript(0, "ab", 1.0, 0, None, None, ("a", "b")).marked == "ab"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda one: one.scored("nobody", None, "cosine"), "nobody"),
        (lambda one: one.scored("bench", None, "best"), "best"),
        (lambda one: one.record("nobody"), "nobody"),
        (lambda one: one.history("nobody", "cosine"), "nobody"),
    ],
)
def test_wrong_questions_are_refused(catalogue: Catalogue, ask: Callable, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ask(catalogue)


# Who may ask ---------------------------------------------------------------------------------------------------------


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.3.2.1", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "")))


PATHS = ["/", "/compare", "/_dash-layout", "/_dash-dependencies", "/assets/explorer.css", "/nothing"]
ANSWERED = dict.fromkeys(PATHS, 200) | {"/nothing": 404}


@pytest.mark.parametrize("path", PATHS)
def test_on_loopback_only_its_own_names_are_answered(catalogue: Catalogue, path: str) -> None:
    """A page from elsewhere that points a name of its own at 127.0.0.1 gets nothing."""
    client = make_app(catalogue).server.test_client()
    for host in ("localhost", "localhost:8050", "127.0.0.1:8050", "[::1]:8050", "[::1]"):
        assert client.get(path, headers={"Host": host}).status_code == ANSWERED[path]
    for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "10.0.0.1"):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("path", PATHS)
def test_elsewhere_every_request_needs_the_token(catalogue: Catalogue, path: str) -> None:
    """In a header, in a cookie, or once in the address, which is then rid of it; a wrong one is as good as none."""
    token = new_token()
    access = Access(token, loopback=False, port=8050)
    server = make_app(catalogue, access).server
    for wrong in ("", "x", token[:-1], token + "x", "é"):
        assert server.test_client().get(path, headers={"Authorization": f"Bearer {wrong}".encode()}).status_code == 401
        assert server.test_client().get(path, query_string={"token": wrong}).status_code == 401
        client = server.test_client()
        client.set_cookie(access.cookie, wrong)
        assert client.get(path).status_code == 401
    assert server.test_client().post("/_dash-update-component", json={}).status_code == 401
    assert server.test_client().get(path, headers={"Authorization": f"Bearer {token}"}).status_code == ANSWERED[path]
    client = server.test_client()
    moved = client.get(path, query_string={"token": token, "id": "a b"})
    assert moved.status_code == 302
    assert token not in moved.headers["Location"]
    assert moved.headers["Location"].endswith("?id=a+b")
    cookie = moved.headers["Set-Cookie"]
    assert cookie.startswith("gradstore-token-8050=")
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert client.get(path).status_code == ANSWERED[path]


def test_on_loopback_the_token_is_needed_too(catalogue: Catalogue) -> None:
    """Every user of a machine reaches its loopback addresses; and the token opens no foreign name."""
    token = new_token()
    client = make_app(catalogue, Access(token, port=1)).server.test_client()
    right = {"Authorization": f"Bearer {token}"}
    assert client.get("/").status_code == 401
    assert client.get("/", headers=right).status_code == 200
    assert client.get("/", headers=right | {"Host": "evil.example"}).status_code == 403
    assert client.get("/", query_string={"token": token}, headers={"Host": "evil.example"}).status_code == 403


def test_a_redirect_stays_here(catalogue: Catalogue) -> None:
    """Paths that browsers read as another host, or that end a header, are moved to this host, quoted."""
    client = make_app(catalogue, Access("secret")).server.test_client()
    for path in ("//evil.example/", "/\\evil.example", "/\r\nX-Bad:1", "\\/evil.example"):
        moved = client.get("/", query_string={"token": "secret"}, environ_overrides={"PATH_INFO": path})
        assert moved.status_code == 302
        assert moved.headers["Location"][:1] == "/"
        assert moved.headers["Location"][1:2] not in ("/", "\\")
        assert "X-Bad" not in moved.headers


def test_wrong_tokens_lock_nobody_out(catalogue: Catalogue) -> None:
    """Neither many wrong ones before, nor another explorer's cookie beside the right one."""
    client = make_app(catalogue, Access("secret", port=7)).server.test_client()
    for _ in range(100):
        assert client.get("/", headers={"Authorization": "Bearer guess"}).status_code == 401
    client.set_cookie("gradstore-token-8", "others")
    assert client.get("/").status_code == 401
    client.set_cookie("gradstore-token-7", "secret")
    assert client.get("/").status_code == 200
    assert client.get("/", query_string={"token": "wrong"}).status_code == 302


def test_tokens_are_compared_in_constant_time(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison that stops at the first difference tells a token letter by letter."""
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    client = make_app(catalogue, Access("secret")).server.test_client()
    client.get("/", headers={"Authorization": "Bearer guess"})
    assert (b"guess", b"secret") in compared
    assert new_token() != new_token()
    assert len(new_token()) >= 40


def test_answers_forbid_everything_foreign(catalogue: Catalogue) -> None:
    answer = make_app(catalogue).server.test_client().get("/")
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert b'lang="en"' in answer.data


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_problems_history_is_its_line_in_every_ranking(history: Any, tmp_path: Path, metric: str) -> None:
    """Read from its own rows, also where rows of a step came late, twice, or not at all, and after deletions."""
    shutil.copytree(history.store.path, tmp_path / "copy")
    store = gradstore.open(tmp_path / "copy", mode="a")
    ids, draw = store.problems("pool")["id"].to_pylist(), np.random.default_rng(0)
    for step, some in ((10, ids[:4]), (0, ids[2:5]), (40, ids[3:6])):
        with store.writer("pool", step=step) as writer:
            writer.append(some, draw.normal(size=(len(some), store.dim)), pass_rate=[0.5] * len(some))
    store.delete("pool", [ids[3], ids[6]])
    with store.writer("pool", step=20) as writer:
        writer.append([ids[3]], draw.normal(size=(1, store.dim)))
    catalogue = Catalogue(gradstore.open(tmp_path / "copy"), "pool", ("bench",))
    names = ["score", "pass_rate", "norm", "n_rollouts", "age"]
    for name in ids[:12]:
        found, steps = catalogue.history(name, metric), []
        for step in catalogue.steps:
            line = catalogue.scored("bench", step, metric)
            line = line[line["id"] == name]
            if len(line):
                own = found[found["step"] == step].iloc[0]
                expected = line.iloc[0][names].astype(float)
                np.testing.assert_allclose(own[names].astype(float), expected, atol=1e-5, rtol=1e-4)
                assert own["state"] == line.iloc[0]["state"]
                steps.append(step)
        assert found["step"].tolist() == steps
    with pytest.raises(RequestError, match="not in the collection"):
        catalogue.history("nobody", metric)
