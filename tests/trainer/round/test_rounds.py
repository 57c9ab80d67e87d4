"""The round against a slow loop, its record, and runs that are killed and go on."""

import json
from dataclasses import replace

import numpy as np
import pytest

import gradstore
from gradstore.engine.searching.targets import target
from gradstore.errors import RequestError
from gradstore.trainer.round.driver import Rounds
from gradstore.trainer.round.settings import RoundSettings


def settings(**changes) -> RoundSettings:
    usual = {
        "candidates": 24,
        "selected": 8,
        "train_batch": 4,
        "steps": 4,
        "rounds": 3,
        "rollouts": 8,
        "target_rollouts": 6,
        "window": 7,
        "fit_problems": 5,
        "seed": 3,
    }
    return RoundSettings(**{**usual, **changes})


def test_a_gradalign_round_is_the_slow_loop(world, training, tmp_path) -> None:
    """Everything refreshed, cosine with the mean validation gradient, the best candidates: written out."""
    run = training(tmp_path / "store", world(), settings(), seeded=False)
    picks = run.run()
    store = gradstore.open(tmp_path / "store")
    assert len(store.rounds("pool")) == 3
    drawn = []
    for number, found in enumerate(store.rounds("pool")):
        step = 4 * number
        policy = training(tmp_path / "other", world(), settings(), seeded=False, step=step).policy
        validation = [policy._group(record["id"], 6, 0) for record in run.world.benchmark]
        own_VD = [policy.gradient(group) if group.has_signal else np.zeros(12) for group in validation]
        target_D = np.mean(own_VD, axis=0)
        scores = {}
        for name in found.table["id"].to_pylist():
            group = policy._group(name, 8, 0)
            if group.has_signal:
                own_D = policy.gradient(group)
                scores[name] = float(own_D @ target_D / np.linalg.norm(own_D) / np.linalg.norm(target_D))
        best = sorted(scores, key=lambda name: -scores[name])[:8]
        assert set(picks[number]) == set(best)
        assert found.picks == picks[number]
        recorded = dict(zip(found.table["id"].to_pylist(), found.table["score"].to_pylist(), strict=True))
        for name, score in scores.items():
            assert recorded[name] == pytest.approx(score, abs=0.02)  # rows are int8
        drawn.append(set(found.table["id"].to_pylist()))
        assert len(drawn[-1]) == 24
    assert drawn[0] != drawn[1]
    assert len(run.policy.rolled) == 3 * (24 + 6)


@pytest.mark.parametrize("warm_up", [0, 1])
def test_a_target_is_measured_every_so_many_rounds(world, training, tmp_path, warm_up) -> None:
    """Rounds between two measurements aim at the newest rows of the benchmark, and roll none of it out."""
    run = training(tmp_path / "store", world(), settings(rounds=4 + warm_up, target_every=2, warm_up=warm_up))
    run.run()
    store = gradstore.open(tmp_path / "store")
    rounds = store.rounds("pool")
    assert [rounds[n].about["target_rollouts"] for n in range(warm_up, 4 + warm_up)] == [36, 0, 36, 0]
    for number in range(warm_up, 4 + warm_up):
        step = 4 * number
        measured = step - 4 * ((number - warm_up) % 2)
        view = store.view("bench", step)
        assert set(view.steps.tolist()) == {measured}
        goal_D = target(store, "bench", step).vector
        goal_D = goal_D / np.linalg.norm(goal_D)
        found = rounds[number].table.to_pydict()
        rows = store.view("pool", step)
        own = {name: row for ids, units in rows.blocks() for name, row in zip(ids, units, strict=True)}
        for name, score, state in zip(found["id"], found["score"], found["state"], strict=True):
            if state == "live":
                assert score == pytest.approx(float(own[name] @ goal_D), abs=0.02)


def test_a_run_without_the_setting_goes_on(world, training, tmp_path) -> None:
    """Runs that were recorded before the setting was there have no such name."""
    assert "target_every" not in settings().describe()
    assert settings(target_every=2).describe()["target_every"] == 2
    with pytest.raises(RequestError, match="target_every is 2, but selector 'lcb' goes by probes"):
        settings(target_every=2, selector="lcb")
    with pytest.raises(RequestError, match="target_every"):
        settings(target_every=0)


def test_the_record_tells_the_round(world, training, tmp_path) -> None:
    """What was asked, what everything scored and cost: readable without this program's help."""
    run = training(tmp_path / "store", world(), settings())
    run.world.rate_of |= {f"p{i:03d}": 0.0 for i in range(0, 60, 2)}
    run.run()
    store = gradstore.open(tmp_path / "store")
    found = store.rounds("pool")[2]
    about = found.about
    assert about["step"] == 8
    assert about["selector"] == "cosine"
    assert about["seed"] == 3
    assert about["benchmarks"] == ["bench"]
    wanted = target(store, "bench", 8)
    assert about["target"] == wanted.describe()
    assert about["settings"]["train_batch"] == 4
    assert about["settings"]["spec"]["objective"]["advantage"] == "mean"
    assert about["n_candidates"] == about["n_rolled_out"] == 24
    assert about["rollouts"] == 24 * 8
    assert about["target_rollouts"] == 6 * 6
    assert {"rollouts", "sketch", "store", "target", "select"} <= about["costs"].keys()
    counts = about["counts"]
    assert counts["live"] + counts["no_signal"] == 24
    assert any("had no signal" in line for line in about["warnings"])
    assert found.table["rolled_out"].to_pylist() == [True] * 24
    assert set(found.table["step"].to_pylist()) == {8}
    silent = np.array(found.table["state"].to_pylist()) == "no_signal"
    assert np.isnan(np.array(found.table["score"].to_pylist())[silent]).all()
    assert store.verify().ok
    assert not store.verify().notes
    values = run.logged[2]
    assert values["round/rollouts"] == 24 * 8
    assert values["round/no_signal"] == counts["no_signal"]
    assert values["round/seconds_without_rollouts"] <= values["round/seconds"]
    assert 0 <= values["round/kept"] <= 1
    assert all(isinstance(value, float) for value in values.values())


def test_a_round_says_what_its_rollouts_are_worth(world, training, tmp_path, monkeypatch) -> None:
    """Rollouts that the policy did not sample (another engine, a late sync of weights) rank as if it had."""
    run = training(tmp_path / "store", world(), settings(rounds=1))
    plain = run.policy.sketch

    def sketch(groups):
        batch = plain(groups)
        return replace(batch, ess_of_ratios=(0.3 * batch.n_rollouts).astype(np.float32))

    monkeypatch.setattr(run.policy, "sketch", sketch)
    run.run()
    about = gradstore.open(tmp_path / "store").rounds("pool")[0].about
    assert about["ess"]["low"] == about["ess"]["rows"] > 0
    assert about["ess"]["median_share"] == pytest.approx(0.3, rel=1e-5)
    assert any("this policy did not sample the rollouts" in line for line in about["warnings"])


def test_the_projection_is_fitted_to_rollouts_that_are_kept(world, training, tmp_path) -> None:
    """Rolling out for the fit alone would be selection rollouts for nothing."""
    run = training(tmp_path / "store", world(), settings(rounds=1))
    run.run()
    assert len(run.policy.fitted) == 6 + 7  # the benchmark, and the first window with fit_problems that have a signal
    assert len(run.policy.rolled) == 24 + 6


VARIANTS = {
    "gradalign": {},
    "probes": {"selector": "shrunk"},
    "budget": {"candidates": None, "refresh": 12, "boundary": 0.3},
    "budget with probes": {"candidates": 30, "refresh": 12, "boundary": 0.3, "selector": "snr:0.7+rand:0.3"},
    "a look first": {"candidates": 30, "refresh": 12, "boundary": 0.3, "selector": "lcb", "first_look": 3},
    "budget on dots": {"candidates": 40, "refresh": 12, "selector": "dot", "explore": 0.3},
    "warm-up": {"warm_up": 1, "selector": "learnalign"},
    "random": {"selector": "rand"},
    "once": {"once": True, "warm_up": 1, "selector": "learnalign", "rounds": 4},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_killed_anywhere_the_picks_are_the_same(world, training, killed, fast_path, name: str) -> None:
    """A resume that picks otherwise is another run; rows appended twice would count twice in every later round."""
    made, observe, tmp_path = settings(**VARIANTS[name]), name != "gradalign", fast_path
    whole = training(tmp_path / "whole", world(), made, observe=observe)
    picks = whole.run()
    reference = gradstore.open(tmp_path / "whole")
    n_calls = whole.policy.calls
    for kill_at in range(1, n_calls + 1, max(1, n_calls // 5)):
        path = tmp_path / f"killed-{kill_at}"
        run = training(path, world(), made, observe=observe, kill_at=kill_at)
        with pytest.raises(killed):
            run.run()
        assert run.resume() == picks, kill_at
        store = gradstore.open(path)
        assert store.history("pool").equals(reference.history("pool")), kill_at
        assert store.history("bench").equals(reference.history("bench")), kill_at
        for ours, theirs in zip(store.rounds("pool"), reference.rounds("pool"), strict=True):
            assert ours.table.equals(theirs.table) or _same(ours.table, theirs.table), kill_at
            assert _told(ours.about) == _told(theirs.about)
        assert store.verify().ok


def _same(one, other) -> bool:
    return all(np.array_equal(one[name], other[name]) or _close(one[name], other[name]) for name in one.column_names)


def _close(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)


def _told(about: dict) -> dict:
    """Without what an interruption may change: times, tokens, and publications."""
    about = {**about, "costs": {}, "tokens": 0, "commit": 0, "selection": {**about["selection"], "commit": 0}}
    refresh = {name: value for name, value in about["refresh"].items() if name != "before"}
    return json.loads(json.dumps({**about, "refresh": refresh}))


def test_killed_between_rows_and_record(world, training, killed, tmp_path, monkeypatch) -> None:
    """All rows there, the record not: nothing is rolled out again."""
    whole = training(tmp_path / "whole", world(), settings()).run()
    run = training(tmp_path / "store", world(), settings())

    def die(*_: object, **__: object) -> int:
        raise killed

    with monkeypatch.context() as patch:
        patch.setattr(gradstore.RecordedRounds, "add", die)
        with pytest.raises(killed):
            run.run()
    assert list(gradstore.open(tmp_path / "store").rounds("pool")) == []
    assert run.resume() == whole
    assert len(run.policy.rolled) == 2 * (24 + 6)


def test_a_round_that_is_recorded_is_read_back(world, training, tmp_path) -> None:
    """A trainer that lost its state comes to the same rounds again; the store answers, nothing is rolled out."""
    run = training(tmp_path / "store", world(), settings())
    picks = run.run()
    again = training(tmp_path / "store", world(), settings())
    assert again.run() == picks
    assert again.policy.rolled == []
    driver = again.rounds()
    assert driver.current is None
    driver.load_state_dict(again.saved)
    assert driver.current.ids == picks[-1]
    with pytest.raises(RequestError, match="all 3 rounds"):
        driver.next(again.policy)


def test_another_run_is_refused(world, training, tmp_path) -> None:
    """A store holds one run: rounds of other settings or steps are no rounds of this one."""
    run = training(tmp_path / "store", world(), settings())
    run.run()
    with pytest.raises(RequestError, match="round 0 is of other settings: rollouts was 8, now 9"):
        training(tmp_path / "store", world(), settings(rollouts=9)).run()
    with pytest.raises(RequestError, match="round 0 was done at step 0, this run comes to it at step 2"):
        training(tmp_path / "store", world(), settings(), step=2).run()
    driver = Rounds(tmp_path / "store", run.world.pool, {"bench": run.world.benchmark}, settings(seed=4))
    with pytest.raises(RequestError, match="the saved state is of other settings: seed was 3, now 4"):
        driver.load_state_dict(run.saved)
    smaller = replace(settings().spec, token_budget=2048)  # micro-batches change no gradient: as runs from before say
    longer = training(tmp_path / "store", world(), settings(rounds=5, window=7, observe="all", spec=smaller))
    assert len(longer.run()) == 5


def test_a_store_that_is_gone_is_not_made_anew(world, training, tmp_path) -> None:
    """A run in its middle must not go on as if nothing had been measured."""
    run = training(tmp_path / "store", world(), settings())
    run.run()
    driver = Rounds(tmp_path / "other", run.world.pool, {"bench": run.world.benchmark}, settings())
    driver.load_state_dict({**run.saved, "rounds": 2})
    with pytest.raises(RequestError, match="there is no store, but the saved state is after round 1"):
        driver.next(run.policy)


def test_rows_collected_before_are_used(world, training, fake_policy, tmp_path) -> None:
    """A base model's sketches from an earlier collection spare the first rounds of a budget their blind start."""
    made = settings(candidates=None, refresh=10, rounds=1)
    run = training(tmp_path / "store", world(), made)
    early = fake_policy(run.world)
    files = early.fit(made.spec, [])
    store = gradstore.create(tmp_path / "store", dim=files.dim, fingerprint=files.fingerprint)
    store.add_problems("pool", run.world.pool)
    groups = [early._group(record["id"], 8, 5) for record in run.world.pool]
    batch = early.sketch(groups)
    with store.writer("pool", step=0) as writer:
        writer.append(batch.ids, batch.sketches, state=batch.states, n_rollouts=batch.n_rollouts)
    picks = run.run()[0]
    found = gradstore.open(tmp_path / "store").rounds("pool")[0]
    assert found.about["counts"]["unmeasured"] == 0
    assert sum(found.table["rolled_out"].to_pylist()) <= 10
    truth = run.world.alignment(0)
    best = sorted(truth, key=lambda name: -truth[name])[:8]
    assert len(set(picks) & set(best)) >= 5


def test_learnaligns_static_use(world, training, tmp_path) -> None:
    """Warm-up at random without a rollout, one choice without a benchmark, kept for the rest of the run."""
    made = settings(selector="learnalign", warm_up=1, once=True, rounds=4, fit_problems=0)
    run = training(tmp_path / "store", world(), made)
    picks = run.run()
    assert picks[1] == picks[2] == picks[3]
    assert {step for step, _, _ in run.policy.rolled} == {4}
    rounds = gradstore.open(tmp_path / "store").rounds("pool")
    assert [found.about["rollouts"] for found in rounds] == [0, 24 * 8, 0, 0]
    assert rounds[0].about["warm_up"]
    assert rounds[0].about["selector"] == "rand"


def test_too_few_with_a_signal_are_filled_up(world, training, tmp_path) -> None:
    """The trainer's arithmetic counts on `selected` problems; what is missing is drawn, recorded and warned about."""
    run = training(tmp_path / "store", world(), settings(rounds=1))
    run.world.rate_of |= {f"p{i:03d}": 1.0 for i in range(60) if i % 10}
    picks = run.run()[0]
    assert len(set(picks)) == 8
    found = gradstore.open(tmp_path / "store").rounds("pool")[0]
    drawn = found.about["picked_by"].count("(random)")
    assert drawn > 0
    assert any("were drawn at random" in line for line in found.about["warnings"])


def test_a_benchmark_without_signal(world, training, tmp_path) -> None:
    """There is no direction to choose by: the round says so and picks at random instead of ending the run."""
    run = training(tmp_path / "store", world(), settings(rounds=2))
    run.world.rate_of |= {record["id"]: 0.0 for record in run.world.benchmark}
    assert len(run.run()[1]) == 8
    found = gradstore.open(tmp_path / "store").rounds("pool")[0]
    assert any("picks at random" in line for line in found.about["warnings"])
    assert found.about["selector"] == "rand"


def test_rollouts_are_exported(world, fake_policy, tmp_path) -> None:
    """What selection rolled out can be read as rollout files."""
    from gradstore.engine.rollouts import read_rollouts

    made = world()
    rounds = Rounds(tmp_path / "store", made.pool, {"bench": made.benchmark}, settings(), export=tmp_path / "rollouts")
    rounds.next(fake_policy(made))
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["round-0000-bench-0000.jsonl", *(f"round-0000-pool-0-{i:04d}.jsonl" for i in range(4))]
    source = read_rollouts(tmp_path / "rollouts" / names[1])
    assert len(source) == 7
    assert all(len(group.responses) == 8 for group in source.groups())


def test_observed_rollouts_are_kept_once(world, fake_policy, tmp_path) -> None:
    """The trainer's own rollouts are measurements for free, at the step of the policy that made them."""
    made = world()
    rounds = Rounds(tmp_path / "store", made.pool, {"bench": made.benchmark}, settings())
    policy = fake_policy(made)
    groups = [policy._group(f"p{i:03d}", 4, 7) for i in range(5)]
    with pytest.raises(RequestError, match="call next before observe"):
        rounds.observe(policy, groups)
    rounds.next(policy)
    policy.train()
    assert rounds.observe(policy, groups) == 5
    assert rounds.observe(policy, groups) == 0
    assert gradstore.open(tmp_path / "store").steps("pool") == {0: 24, 1: 5}
    with pytest.raises(RequestError, match="problem 'v0' is not in the pool"):
        rounds.observe(policy, [policy._group("v0", 4, 7)])
    policy.train()
    with pytest.raises(RequestError, match="several groups"):
        rounds.observe(policy, [*groups, groups[0]])


@pytest.mark.parametrize("selector", ["rand", "cosine"])
def test_rollouts_are_weighed_by_the_rounds_target(world, fake_policy, tmp_path, selector: str) -> None:
    """By the newest target, with any selector; rolled out for it is the benchmark alone. Twice gives the same."""
    policy = fake_policy(world())
    made = settings(selector=selector, rollout_rule="oppose_target")
    rounds = Rounds(tmp_path / "store", policy.world.pool, {"bench": policy.world.benchmark}, made)
    with pytest.raises(RequestError, match="call next before weigh"):
        rounds.weigh(policy, [])
    picks = rounds.next(policy).ids[:4]
    if selector == "rand":
        assert {name for _, name, _ in policy.rolled} == {record["id"] for record in policy.world.benchmark}
    policy.train()
    groups = policy.roll_out([record for record in policy.world.pool if record["id"] in picks], 8, seed=1)
    found = rounds.weigh(policy, groups)
    target_D = target(gradstore.open(tmp_path / "store"), "bench", 0).vector
    rows = policy.sketch_rollouts(groups).rows
    for own_G, row_GD in zip(found.weights, rows, strict=True):
        assert own_G.tolist() == [float(dot >= 0) for dot in row_GD @ target_D]
    assert 0 < found.dropped < 1
    assert found.n_tokens == 3 * 8 * 4
    again = Rounds(tmp_path / "store", policy.world.pool, {"bench": policy.world.benchmark}, made)
    again.load_state_dict(rounds.state_dict())
    for one, other in zip(found.weights, again.weigh(policy, groups).weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_target_without_signal_drops_nothing(world, fake_policy, tmp_path) -> None:
    """A step must not fail because the benchmark is solved."""
    policy = fake_policy(world())
    policy.world.rate_of |= {record["id"]: 1.0 for record in policy.world.benchmark}
    made = settings(selector="rand", rollout_rule="oppose_target")
    rounds = Rounds(tmp_path / "store", policy.world.pool, {"bench": policy.world.benchmark}, made)
    rounds.next(policy)
    found = rounds.weigh(policy, policy.roll_out(policy.world.pool[:3], 8, seed=1))
    assert all((own == 1).all() for own in found.weights)
    assert (found.dropped, found.n_tokens) == (0, 0)


def test_rules_that_cannot_work_are_refused(world, fake_policy, tmp_path) -> None:
    with pytest.raises(RequestError, match="rollout_rule 'oppose_target' needs a target"):
        Rounds(tmp_path / "store", world().pool, {}, settings(selector="rand", rollout_rule="oppose_target"))
    with pytest.raises(RequestError, match=r"rollout_rule 'dvt' is not one of.*did you mean 'dtv'"):
        settings(rollout_rule="dvt")
    with pytest.raises(RequestError, match="there is no rollout_rule"):
        settings(rollout_threshold=0.5)
    with pytest.raises(RequestError, match="rollout_threshold"):
        settings(rollout_rule="dtv", rollout_threshold=-0.5)
    assert "rollout_rule" not in settings().describe(), "rounds recorded before there were rules are the same"
    assert settings(rollout_rule="dtv").describe()["rollout_threshold"] == 0
    policy = fake_policy(world())
    rounds = Rounds(tmp_path / "store", policy.world.pool, {}, settings(selector="rand"))
    rounds.next(policy)
    with pytest.raises(RequestError, match="nothing to weigh rollouts by"):
        rounds.weigh(policy, [])


def test_wrong_requests(world, tmp_path) -> None:
    """Refused before anything is rolled out."""
    made = world()
    with pytest.raises(RequestError, match="selector 'cosine' needs a target"):
        Rounds(tmp_path / "store", made.pool, {}, settings())
    with pytest.raises(RequestError, match="give the benchmark another name"):
        Rounds(tmp_path / "store", made.pool, {"pool": made.benchmark}, settings())
    with pytest.raises(RequestError, match="'p000' occurs more than once"):
        Rounds(tmp_path / "store", [*made.pool, made.pool[0]], {"bench": made.benchmark}, settings())
    with pytest.raises(RequestError, match="'nonesuch' is not one of"):
        Rounds(tmp_path / "store", made.pool, {"bench": made.benchmark}, settings(selector="nonesuch"))
    with pytest.raises(RequestError, match="selector 'shrunk' goes by probes of this step: refresh must be above 0"):
        Rounds(tmp_path / "store", made.pool, {"bench": made.benchmark}, settings(selector="shrunk", refresh=0))
    with pytest.raises(RequestError, match="not a state of selection rounds"):
        Rounds(tmp_path / "store", made.pool, {"bench": made.benchmark}, settings()).load_state_dict({})


def test_tensorboard_gets_the_numbers(tmp_path) -> None:
    """One implementation of the logger that a trainer passes in; a resumed run replaces what it logs again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradstore.trainer.loggers import TensorBoard

    log = TensorBoard(tmp_path)
    log.log({"round/rollouts": 192.0}, 4)
    log.log({"round/rollouts": 96.0}, 8)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("round/rollouts")] == [(4, 192.0), (8, 96.0)]
    log.close()
    resumed = TensorBoard(tmp_path, purge_step=5)
    resumed.log({"round/rollouts": 48.0}, 8)
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("round/rollouts")] == [(4, 192.0), (8, 48.0)]
