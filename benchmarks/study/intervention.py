"""Do scores mean what they say? Train on some problems, and measure what the benchmark gained.

From one start, GRPO steps on a set of problems, with fresh rollouts in every draw; the gain is the change of the
expected accuracy on held-out problems. Two questions:

- **groups**: all problems of the pool, sorted by score and cut into groups of ten: does a group's predicted gain (the
  sum of its dots with the target) go with its measured gain? Scores of several sketch sizes, numbers of rollouts and
  ages are compared on the same groups and gains, and with the exact dot. The steps are Adam's, as in training, and, as
  the dot predicts, plain gradient steps: Adam's first steps move all weights as far for a faint gradient as for a clear
  one.
- **sets**: the 64 problems that a selector ranks first, the 64 it ranks last, and 64 at random.

`python -m benchmarks.study intervene` appends a row for each measurement to a file, and goes on where it was stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from benchmarks.study.accuracy import answer_logprobs
from benchmarks.study.bed import Bed, Problems, StudySettings
from benchmarks.study.results import append_result
from benchmarks.study.running import begun, update_settings
from benchmarks.study.statistics import estimate
from gradstore.engine.gradients.exact import exact_dots, layer_gradients
from gradstore.engine.rollouts.group import Group
from gradstore.engine.sketches.bases import fit_sketcher
from gradstore.engine.sketches.spec import SketchSpec
from gradstore.trainer.local.grpo import Learner
from gradstore.trainer.sampling.backends import derived_seed

POOL, TRAINING, DRAW, AGEING = range(4)
"""Purposes of derived seeds."""
PLAIN_EPS = 1e6
"""Adam's eps for plain gradient steps: far above any gradient."""
EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the experiment."""

    arm: str = "wrong_truths"
    pool: int = 240
    groups: int = 24
    group_steps: int = 2
    """GRPO steps on a group, all of its problems in each."""
    chosen: int = 64
    """Problems in a set; each is trained on once."""
    set_batch: int = 16
    draws: int = 5
    dims: tuple[int, ...] = (64, 512, 4096)
    """Sketch sizes compared; the pool is sorted by dots of the middle one, from the middle number of rollouts."""
    rollouts: tuple[int, ...] = (4, 16, 64)
    ages: tuple[int, ...] = (0, 16)
    """Steps on random problems between scores and measured gains."""
    plain_lr: float = 0.01
    """Learning rate of the plain gradient steps, which are measured at the first age alone. At 0.1, two steps on the
    first groups halved the accuracy."""
    fit_problems: int = 32


SHORT_SIZES = Sizes(
    pool=16, groups=4, group_steps=1, chosen=4, set_batch=4, draws=2, dims=(16, 64, 256), rollouts=(2, 4, 8),
    ages=(0, 1), fit_problems=8,
)  # fmt: skip


class Interventions:
    """The experiment on one bed at one seed; rows are appended to `path`, those in `rows` are not measured again."""

    def __init__(
        self, bed: Bed, settings: StudySettings, sizes: Sizes, seed: int, path: Path, rows: Sequence[dict[str, Any]],
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.bed, self.sizes, self.seed, self.path, self.tell = bed, sizes, seed, path, tell
        self.settings = replace(settings, pool=sizes.pool)
        self.problems: Problems = bed.problems(sizes.arm, seed, self.settings)
        self.records = {record["id"]: record for record in self.problems.pool}
        self.rows = {row["name"]: row for row in rows}
        self.policy, _ = begun(bed, self.settings)
        self._start = {name: value.clone() for name, value in self.policy.model.state_dict().items()}

    def run(self, sets: Sequence[str] = ("dot", "cosine", "accgreedy")) -> None:
        """All measurements that are missing. sets: selectors of the sets."""
        if "scores" not in self.rows:
            self._add("scores", **self._scores())
        youngest, *older = self.sizes.ages
        self._groups_at(youngest)
        self._groups_at(youngest, plain=True)
        self._aged(0)
        for draw in range(self.sizes.draws):
            for what in ("random", *(f"{name} {end}" for name in sets for end in ("top", "bottom"))):
                name = f"{what} draw {draw}"
                if name not in self.rows:
                    self._measure(name, self.set_of(what, draw), draw, None)
        for age in older:
            self._groups_at(age)

    def _groups_at(self, age: int, *, plain: bool = False) -> None:
        names = [group_name(g, age, plain=plain) for g in range(self.sizes.groups)]
        missing = [g for g, name in enumerate(names) if name not in self.rows]
        if missing:
            self._aged(age)
        for g in missing:
            self._measure(names[g], self.groups()[g], 0, self.sizes.group_steps, plain=plain, age=age)

    def groups(self) -> list[list[str]]:
        """The pool's ids in equal parts, by falling dot."""
        return [part.tolist() for part in np.array_split(np.array(self.ranking("dot"), object), self.sizes.groups)]

    def ranking(self, selector: str) -> list[str]:
        """The pool's ids, best first, ties in the order of the pool; problems without a signal count as zero."""
        row = self.rows["scores"]
        values = np.array(row["scores"][selector])
        return [row["ids"][place] for place in np.argsort(-values, kind="stable")]

    def set_of(self, what: str, draw: int) -> list[str]:
        """The ids of a set: `SELECTOR top`, `SELECTOR bottom`, or `random`, another one in each draw."""
        if what == "random":
            seed = derived_seed(self.seed, DRAW, draw)
            return [
                str(one) for one in np.random.default_rng(seed).permutation(list(self.records))[: self.sizes.chosen]
            ]
        selector, end = what.split()
        order = self.ranking(selector)
        return order[: self.sizes.chosen] if end == "top" else order[-self.sizes.chosen :]

    def _scores(self) -> dict[str, Any]:
        """Scores of every kind, from one set of rollouts: names as in `score_name`, and the selectors' own."""
        started, sizes = time.monotonic(), self.sizes
        pool = self._rolled_out(self.problems.pool, max(sizes.rollouts))
        benchmark = self._rolled_out(self.problems.validation, self.settings.rollouts)
        usual_dim, usual_n = sizes.dims[len(sizes.dims) // 2], sizes.rollouts[len(sizes.rollouts) // 2]
        usual = [first(group, usual_n) for group in pool]
        spec = SketchSpec(basis="fitted", rank=self.settings.rank, dim=sizes.dims[0])
        sketchers = [
            fit_sketcher(self.policy.model, replace(spec, dim=dim), usual[: sizes.fit_problems], benchmark)[0]
            for dim in sizes.dims
        ]
        self.tell(f"rolled out and fitted, {time.monotonic() - started:.0f} s")
        projections = [sketcher.projection for sketcher in sketchers]
        targets = [batch.sketches.mean(0) for batch in sketchers[0].sketch_in(projections, benchmark)]
        scores: dict[str, list[float]] = {}
        for n in sizes.rollouts:
            groups = [first(group, n) for group in pool]
            for dim, batch, target in zip(
                sizes.dims, sketchers[0].sketch_in(projections, groups), targets, strict=True
            ):
                scores[score_name(dim, n)] = [float(dot) for dot in batch.sketches.astype(float) @ target]
                if (dim, n) == (usual_dim, usual_n):
                    rates, norms = batch.pass_rates, np.linalg.norm(batch.sketches, axis=1)
            self.tell(f"sketched {n} rollouts, {time.monotonic() - started:.0f} s")
        dots = np.array(scores[score_name(usual_dim, usual_n)])
        direction = layer_gradients(self.policy.model, benchmark)
        exact = exact_dots(self.policy.model, usual, direction).dots[:, 0]
        scores[score_name(EXACT, usual_n)] = [float(dot) for dot in exact]
        scores["dot"] = dots.tolist()
        scores["cosine"] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).tolist()
        scores["accgreedy"] = (-np.abs(rates.astype(float) - 0.5)).tolist()
        return {
            "ids": [group.problem_id for group in pool],
            "tags": [record["tags"][0] for record in self.problems.pool],
            "scores": scores,
            "seconds": time.monotonic() - started,
        }

    def _rolled_out(self, records: Sequence[Mapping[str, Any]], n: int) -> list[Group]:
        window = self.settings.window
        parts = range(0, len(records), window)
        seeds = (derived_seed(self.seed, POOL, n, start) for start in parts)
        pairs: Iterator[tuple[int, int]] = zip(parts, seeds, strict=True)
        return [g for start, seed in pairs for g in self.policy.roll_out(records[start : start + window], n, seed=seed)]

    def _aged(self, age: int) -> None:
        """Set the start of the measurements: the bed's policy after `age` steps on random problems."""
        self.policy.model.load_state_dict(self._start)
        learner = self._learner()
        random = np.random.default_rng(derived_seed(self.seed, AGEING, age))
        for step in range(age):
            ids = random.permutation(list(self.records))[: self.settings.train_batch]
            self._step(learner, [str(one) for one in ids], (age, step))
        self._begin = {name: value.clone() for name, value in self.policy.model.state_dict().items()}
        self._before = self._accuracies()

    def _learner(self, *, plain: bool = False) -> Learner:
        settings = update_settings(self.bed, self.settings)
        if plain:  # without moments and with such an eps, Adam is plain gradient ascent
            lr = self.sizes.plain_lr * PLAIN_EPS
            settings = replace(settings, lr=lr, betas=(0.0, 0.0), eps=PLAIN_EPS, clip_grad=None)
        return Learner(self.policy.model, settings)

    def _measure(
        self, name: str, ids: Sequence[str], draw: int, steps: int | None, *, plain: bool = False, **about: Any
    ) -> None:
        """One row: the gain of training on these problems. steps: on all of them in each; None: on a batch in each."""
        started = time.monotonic()
        self.policy.model.load_state_dict(self._begin)
        learner = self._learner(plain=plain)
        size = self.sizes.set_batch
        batches = [ids] * steps if steps else [ids[start : start + size] for start in range(0, len(ids), size)]
        for step, batch in enumerate(batches):
            self._step(learner, batch, (1000 + draw, step))
        after = self._accuracies()
        gain = {key: after[key] - self._before[key] for key in after}
        about |= {"plain": True} if plain else {}
        self._add(name, **about, ids=list(ids), gain=gain, seconds=time.monotonic() - started)

    def _step(self, learner: Learner, ids: Sequence[str], purpose: tuple[int, int]) -> None:
        records = [self.records[one] for one in ids]
        groups = self.policy.roll_out(records, self.settings.rollouts, seed=derived_seed(self.seed, TRAINING, *purpose))
        learner.step(groups)

    def _accuracies(self) -> dict[str, float]:
        """Expected accuracy and mean log-likelihood of the right answers, on the held-out problems (`test`) and on the
        benchmark that the scores aim at."""
        found = {}
        for name, records in (("test", self.problems.test), ("benchmark", self.problems.validation)):
            logprobs_P = answer_logprobs(self.policy.model, self.policy.tokenizer, records)
            found |= {name: float(np.exp(logprobs_P).mean()), f"{name} nats": float(logprobs_P.mean())}
        return found

    def _add(self, name: str, **values: Any) -> None:
        row = {"name": name, "seed": self.seed, **values}
        append_result(self.path, row)
        self.rows[name] = row
        gained = f"{values['gain']['test']:+.4f}, " if "gain" in values else ""
        self.tell(f"{name}: {gained}{values['seconds']:.0f} s")


def first(group: Group, n: int) -> Group:
    """The group's first n rollouts."""
    logprobs = None if group.logprobs is None else group.logprobs[:n]
    return replace(group, responses=group.responses[:n], rewards=group.rewards[:n], logprobs=logprobs)


def score_name(dim: int | str, rollouts: int) -> str:
    """Name of a dot: of sketches of this size, or `exact`, from so many rollouts."""
    return f"{dim}, {rollouts} rollouts"


def group_name(group: int, age: int, *, plain: bool = False) -> str:
    """Name of the row of a group's gain."""
    return f"group {group} age {age}" + (" plain" if plain else "")


def correlations(rows: Sequence[dict[str, Any]], gain: str = "test") -> list[tuple[str, str, float, float, float]]:
    """(score, steps, Spearman correlation over groups between predicted and measured gain, low, high) of every dot.

    steps: `Adam` or `plain`, and the age.

    The predicted gain is the sum of the group's dots; only where all groups are measured. low, high: 95 % interval by
    drawing groups with replacement.
    """
    by_name = {row["name"]: row for row in rows}
    scores = by_name["scores"]
    place = {one: p for p, one in enumerate(scores["ids"])}
    found = []
    for (age, plain), groups in _kinds(rows).items():
        if sum(len(row["ids"]) for row in groups) < len(place):
            continue
        measured = np.array([row["gain"][gain] for row in groups])
        for name in (name for name in scores["scores"] if "rollouts" in name):
            values = np.array(scores["scores"][name])
            predicted = np.array([values[[place[one] for one in row["ids"]]].sum() for row in groups])
            random = np.random.default_rng(0)
            drawn = [random.integers(0, len(groups), len(groups)) for _ in range(2000)]
            sampled = [spearmanr(predicted[d], measured[d])[0] for d in drawn]
            low, high = np.nanquantile(sampled, (0.025, 0.975))
            steps = f"{'plain' if plain else 'Adam'}, age {age}"
            found.append((name, steps, float(spearmanr(predicted, measured)[0]), float(low), float(high)))
    return found


def _kinds(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, bool], list[dict[str, Any]]]:
    """(age, whether the steps were plain) -> the groups' rows."""
    found: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for row in rows:
        if "age" in row:
            found.setdefault((row["age"], row.get("plain", False)), []).append(row)
    return found


def set_gains(rows: Sequence[dict[str, Any]], gain: str = "test") -> dict[str, list[float]]:
    """Set (`random`, `dot top`, ...) -> its gain in each draw, by number."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        what, drawn, draw = row["name"].rpartition(" draw ")
        if drawn:
            found.setdefault(what, {})[int(draw)] = row["gain"][gain]
    return {what: [own[draw] for draw in sorted(own)] for what, own in found.items()}


def section(rows: Sequence[dict[str, Any]]) -> str:
    """The page's part about the measurements."""
    lines = [
        "## Attribution checked by intervention\n",
        "`python -m benchmarks.study intervene`: the policy takes GRPO steps on some problems of the pool "
        "with wrong truths, always from the same start, and the gain is the change of its accuracy on the held-out "
        f"problems ({len(rows) - 1} measurements in interventions.jsonl).\n",
    ]
    groups = [own for kind in _kinds(rows).values() for own in kind]
    found = correlations(rows)
    if groups and not found:
        lines.append(f"**Groups.** {len(groups)} are measured so far; the table comes when all are.\n")
    elif groups:
        n, size = len({row["name"].split()[1] for row in groups}), len(groups[0]["ids"])
        lines += [
            f"**Groups.** The pool in {n} groups of {size} problems by falling dot; two steps on each, of Adam as in "
            "training or of the plain gradient. Spearman's correlation between a group's predicted gain (the sum of "
            "its dots) and its measured gain, with 95 % intervals from drawing groups; `age`: steps on random problems "
            "between the scores and the measurement.\n",
            "| dot of | steps | Spearman | of the gain in nats |",
            "| --- | --- | --- | --- |",
        ]
        for own, nats in zip(found, correlations(rows, "test nats"), strict=True):
            lines.append(f"| {own[0]} | {own[1]} | {_interval(*own[2:])} | {_interval(*nats[2:])} |")
        lines.append("")
    gains = set_gains(rows)
    if gains:
        n = min(map(len, gains.values()))
        lines += [
            f"**Sets.** {len(_row(rows, next(iter(gains)))['ids'])} problems each, one pass of GRPO steps, {n} draws "
            "of rollouts; `random` draws its problems anew too. Gains of accuracy, means with 95 % t intervals.\n",
            "| trained on | gain | less `random`, draw by draw | wrong truths among them |",
            "| --- | --- | --- | ---: |",
        ]
        tags = dict(zip(_row(rows, "scores")["ids"], _row(rows, "scores")["tags"], strict=True))
        for what, own in gains.items():
            paired = [a - b for a, b in zip(own, gains["random"], strict=False)]
            wrong = np.mean([tags[one] != "clean" for one in _row(rows, what)["ids"]])
            lines.append(f"| {what} | {_mean(own)} | {_mean(paired) if what != 'random' else ''} | {wrong:.0%} |")
    return "\n".join(lines) + "\n"


def _row(rows: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"].rpartition(" draw ")[0] == what or row["name"] == what)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _mean(values: Sequence[float]) -> str:
    found = estimate(values)
    return f"{found.mean:+.4f}" + ("" if found.n < 2 else f" [{found.low:+.4f}, {found.high:+.4f}]")
