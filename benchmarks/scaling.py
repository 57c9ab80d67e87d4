"""From one GPU to a cluster: what a run costs by `plan`, what the driver of Ray workers can do, and where scaling ends.

    python -m benchmarks.scaling [--link 10] [--graders 16]

Four tables:

1. the plan: 1.5B on 1 GPU, 8B on 8, 30B-A3B on 16; pools of 10k, 100k and 1M problems;
2. the driver's costs per window and problem, measured here: processor time of its one thread, so that other load on
   the machine counts little; publications by the clock;
3. the check: real Ray workers (1, 2, 4) that sleep instead of computing, against the simulation of the same run;
4. the simulation (benchmarks/simulation.py) for up to 64 GPUs and 1M problems, with the workers' times of the plan and
   the driver's of table 2, and the number of workers from which the driver is the limit.

Not in the simulation: what Ray's own processes and the network add beyond `--link`, failures, unequal GPUs, a GPU's
slack at the end of a call of vLLM.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.ray_driver import (
    PROMPT,
    ROLLOUTS,
    TOKENS,
    Driver,
    Sleeping,
    measured,
    random_rollouts,
    sleeping_run,
    slowness,
)
from benchmarks.simulation import Job, simulate
from gradstore.cli.show import duration, print_line, print_table
from gradstore.engine.cluster.pool import Pool, Window
from gradstore.engine.cluster.ray_start import connected
from gradstore.engine.rollouts.source import read_rollouts
from gradstore.engine.rollouts.write import write_rollouts
from gradstore.shards import BLOCK
from gradstore.wording import size

RUNS = (("Qwen2.5-1.5B", 1), ("Qwen3-8B", 8), ("Qwen3-30B-A3B", 16))
POOLS = (10_000, 100_000, 1_000_000)
LAYOUTS = ((1, 1), (8, 1), (64, 1), (64, 8), (256, 32))
"""GPUs, and shards that they work on: each has a driver and a store of its own (docs/shards.md)."""
GRADED = 1300
"""Answers of mathematics that one core grades in a second: `python -m benchmarks.rewards`, docs/benchmarks.md."""
SPREAD = 0.2
"""Assumed: standard deviation of the logarithm of a window's work."""
LATENCY = 0.001
"""Assumed: seconds of a message between machines."""
CHECKED = (64, 4)
"""Windows and problems of a window in the check."""
WINDOW_TOKENS, WINDOW_PROBLEMS = 16, 256
"""Bounds of a window of `collect`: micro-batches of tokens, and problems (engine/sketches/collector.py)."""


def main(
    link: Annotated[float, typer.Option(help="Gigabits per second that the driver's machine can send.")] = 10.0,
    graders: Annotated[int, typer.Option(help="Cores for rewards on the driver's machine.")] = 16,
    dim: Annotated[int, typer.Option(help="Dimensions of a sketch.")] = 1024,
) -> None:
    """Print the tables."""
    plan_table()
    with tempfile.TemporaryDirectory() as temporary, connected("local", 4, object_store=500 << 20):
        folder = Path(temporary)
        driver = measured(folder, dim)
        checks = checked(folder, driver, dim)
    driver_table(driver)
    columns = ["ms of work", "workers", "driver, ms a window", "by table 2", "slowed by others", "measured s",
               "simulated s", "ratio"]  # fmt: skip
    title = f"3. {CHECKED[0]} windows of {CHECKED[1]} problems, workers that sleep"
    print_table(title, columns, checks, right=columns)
    print_line(
        "Slowed by others: seconds by the clock for a second of the driver's processor time, measured before and after "
        "each run; the simulation's driver is slower by this."
    )
    simulation_tables(driver, link * 1e9 / 8, graders)


# The plan


def planned(name: str, n_pool: int, n_gpus: int) -> Any:
    """`gradstore plan` for H100s, 16 rollouts of 1,000 tokens."""
    from gradstore.engine.planning.devices import GPUS
    from gradstore.engine.planning.plan import Request, plan
    from gradstore.engine.planning.shapes import shape_of

    request = Request(n_pool, ROLLOUTS, TOKENS, PROMPT, n_devices=n_gpus)
    return plan(shape_of(name, dtype=GPUS["h100"].dtype), request, GPUS["h100"])


def plan_table() -> None:
    wanted = {"rollouts, vllm": "rollouts", "sketches": "sketches", "fit and measure": "fit", "query": "query"}
    rows = []
    for name, n_gpus in RUNS:
        for n_pool in POOLS:
            found = planned(name, n_pool, n_gpus)
            stages = {short: stage for stage in found.stages for long, short in wanted.items() if stage.name == long}
            fits = "yes" if all(stage.fits for stage in stages.values()) else "NO"
            times = [duration(stages[short].seconds) for short in wanted.values()]
            disk = [size(stages[short].disk_bytes) for short in ("rollouts", "sketches")]
            rows.append([name, str(n_gpus), f"{n_pool:,}", *times, *disk, fits])
    columns = ["model", "H100s", "pool", *wanted.values(), "rollout files", "store", "fits"]
    print_table("1. By `gradstore plan`, 16 rollouts of 1,000 tokens", columns, rows, right=columns[1:-1])


# The driver's costs


def driver_table(driver: Driver) -> None:
    parts = {
        "collect: check the file (before the first window), JSON Lines": driver.index[".jsonl"],
        "the same, Parquet": driver.index[".parquet"],
        "collect: read a group (once before, once for the workers), JSON Lines": driver.read[".jsonl"],
        "the same, Parquet ": driver.read[".parquet"],
        "collect: hand out a window": driver.submit,
        "collect: take a result": driver.take,
        "collect: append rows": driver.append,
        "rollout: decode responses": driver.decode,
        "rollout: write rows": driver.write,
    }
    rows = [[name, f"{line.window * 1e3:.2f}", f"{line.problem * 1e3:.2f}"] for name, line in parts.items()]
    rows.append(["collect: publish, every 5 s", f"{driver.publish * 1e3:.1f} each", ""])
    rows.append(["the same at 1M rows", f"{(driver.publish + 1e6 * driver.publish_per_row) * 1e3:.1f} each", ""])
    columns = ["driver", "ms a window", "ms a problem"]
    print_table(f"2. The driver, measured: {ROLLOUTS} rollouts of {TOKENS:,} tokens", columns, rows, right=columns[1:])
    print_line(
        f"Bytes a problem: {size(driver.file_bytes)} in a rollout file, {size(driver.sent_bytes)} to or from a worker, "
        f"{size(driver.row_bytes)} in the store."
    )


# The check


def checked(folder: Path, driver: Driver, dim: int) -> list[list[str]]:
    """Runs with sleeping workers, against the simulation of them with the costs of table 2: rows of a table."""
    path, (n_windows, n_problems) = folder / "check.jsonl", CHECKED
    with write_rollouts(path) as writer:
        writer.append(random_rollouts(8, 14))
    source, rows = read_rollouts(path), []
    costs: dict[str, Any] = {
        "submit": {"reading": n_problems * driver.read[".jsonl"].problem, "Ray": driver.submit(n_problems)},
        "take": {"Ray": driver.take(n_problems)},
        "use": {"store": driver.append(n_problems)},
    }
    for workers in (1, 2, 4):
        with Pool(Sleeping(dim), workers=workers) as pool:
            warm = [Window((list(source.groups())[:1], 0.2), 1, "warm") for _ in range(4 * workers)]
            list(pool.map(warm))
            for work in (0.4, 0.1, 0.0):
                to, slow = folder / f"check-{work}-{workers}", slowness(source)
                took, used = sleeping_run(to, source, pool, work, n_windows, n_problems, dim)
                slow = (slow + slowness(source)) / 2
                job = Job(windows=n_windows, work=work, **costs)
                busy = {when: {what: slow * cost for what, cost in parts.items()} for when, parts in costs.items()}
                found = simulate(Job(windows=n_windows, work=work, **busy), workers)
                rows.append(
                    [f"{work * 1e3:.0f}", str(workers), f"{used * 1e3:.0f}", f"{job.driver * 1e3:.0f}",
                     f"{slow:.1f}", f"{took:.2f}", f"{found.seconds:.2f}", f"{took / found.seconds:.2f}"]
                )  # fmt: skip
    return rows


# The simulation


def collecting(driver: Driver, name: str, n_pool: int, suffix: str) -> tuple[Job, int, float]:
    """`collect --ray`: the job, problems of a window, and the driver's seconds before the first window."""
    found = planned(name, n_pool, 1)
    stage = next(stage for stage in found.stages if stage.name == "sketches")
    per_problem = ROLLOUTS * (PROMPT + TOKENS)
    n = min(WINDOW_PROBLEMS, -(-WINDOW_TOKENS * found.micro_batch_tokens // per_problem))
    job = Job(
        windows=-(-n_pool // n),
        work=stage.seconds / n_pool * n,
        spread=SPREAD,
        submit={"reading rollouts": n * driver.read[suffix].problem, "Ray": driver.submit(n)},
        take={"Ray": driver.take(n)},
        use={"store": driver.append(n)},
        publish=driver.publish + n_pool / 2 * driver.publish_per_row,
        sent=n * driver.sent_bytes,
        returned=n * driver.row_bytes * 4,
    )
    return job, n, n_pool * (driver.index[suffix].problem + driver.read[suffix].problem)


def rolling_out(driver: Driver, name: str, n_pool: int, graders: int) -> tuple[Job, int, float]:
    """`rollout --ray` with vLLM and mathematics; the driver does nothing alone."""
    found = planned(name, n_pool, 1)
    stage = next(stage for stage in found.stages if stage.name == "rollouts, vllm")
    n = BLOCK
    job = Job(
        windows=-(-n_pool // n),
        work=stage.seconds / n_pool * n,
        spread=SPREAD,
        submit={"Ray": driver.submit.window},
        take={"Ray": driver.take.window + n * driver.submit.problem},
        use={
            "decoding": n * driver.decode.problem,
            "rewards": n * ROLLOUTS / (GRADED * graders),
            "rollout file": n * driver.write.problem,
        },
        sent=n * 8.0 * PROMPT,
        returned=n * driver.sent_bytes,
    )
    return job, n, 0.0


def simulation_tables(driver: Driver, link: float, graders: int) -> None:
    rows, limits, n_pool = [], [], POOLS[-1]
    for name, _ in RUNS:
        for kind, made in {
            "rollout": rolling_out(driver, name, n_pool, graders),
            "collect": collecting(driver, name, n_pool, ".jsonl"),
            "collect, Parquet": collecting(driver, name, n_pool, ".parquet"),
        }.items():
            job, n, alone = made
            for gpus, shards in LAYOUTS:
                rows.append([name, kind, str(gpus), str(shards), *_columns(job, gpus, shards, link, alone)])
            limits.append([name, kind, str(n), *_limits(job, link)])
    shares = [f"{what} busy" for what in ("GPUs", "driver", "link")]
    columns = ["model", "command", "GPUs", "shards", "time", "alone", "x one GPU", *shares]
    title = f"4. Simulated: 1M problems, one GPU per worker, {link * 8e-9:.0f} Gbit/s, {graders} cores for rewards"
    print_table(title, columns, rows, right=columns[2:])
    window = [f"{what} a window" for what in ("problems", "GPU s", "driver ms")]
    full = ["driver full at", "by", "without it at", "link full at"]
    columns = ["model", "command", *window, *full]
    right = [name for name in columns[2:] if name != "by"]
    print_table("5. What gives way first: GPUs of one driver", columns, limits, right=right)
    print_line(
        "Alone: one thread of each driver works and no GPU does: before the first window `collect` checks its file, "
        "then its groups. Without it: if what takes most of the driver's time took none. Merging shards is not counted."
    )


def _limits(job: Job, link: float) -> list[str]:
    parts: dict[str, float] = {}
    for where in (job.submit, job.take, job.use):
        for part, seconds in where.items():
            parts[part] = parts.get(part, 0.0) + seconds
    first = max(parts, key=lambda part: parts[part])
    return [
        f"{job.work:.1f}", f"{job.driver * 1e3:.0f}", f"{job.work / job.driver:,.0f}",
        f"{first} ({parts[first] / job.driver:.0%})", f"{job.work / (job.driver - parts[first]):,.0f}",
        f"{job.work * link / max(job.sent, job.returned):,.0f}",
    ]  # fmt: skip


def _columns(job: Job, gpus: int, shards: int, link: float, alone: float) -> list[str]:
    """Simulate one shard. At most so many windows that the end of the run is still a small part; the rest is in
    proportion."""
    workers, windows = gpus // shards, job.windows / shards
    short = replace(job, windows=int(min(windows, max(4000, 60 * workers))))
    found = simulate(short, workers, link, latency=LATENCY)
    whole = found.seconds * windows / short.windows + alone / shards
    computing = (whole - alone / shards) / whole
    return [
        duration(whole), duration(alone / shards), f"{(job.work * job.windows + alone) / whole:.1f}",
        f"{found.workers_busy * computing:.0%}", f"{found.driver_busy * computing + 1 - computing:.0%}",
        f"{found.link_busy * computing:.0%}",
    ]  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
