"""One rank of verl's actor with our worker class, without Ray: python worker_rank.py RANK WORLD FOLDER.

Makes the worker verl would make, has it sketch and probe this rank's share of the groups in FOLDER/groups.pkl, and
leaves what it found in FOLDER/rank-RANK.pkl.
"""

import os
import pickle
import sys
from pathlib import Path


def main(rank: int, world: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",
        "DIST_INIT_METHOD": f"file://{folder}/meeting-{world}",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    import torch
    from hydra import compose, initialize_config_module

    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import overrides

    from gradstore.engine import SketchSpec
    from gradstore.engine.gradients.gradient_pass import GradientPass
    from gradstore.engine.gradients.ranks import deal
    from gradstore.engine.gradients.sharding import is_sharded, own_part, reshard
    from gradstore.trainer.verl.worker import SketchingWorker

    torch.set_num_threads(1)
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=overrides(folder, n_ranks=world))
    worker = SketchingWorker(config=config.actor_rollout_ref, role="actor")
    worker.init_model()
    model = worker.actor.engine.module
    reduced: list[str] = []
    reduce = torch.distributed.reduce_scatter_tensor
    torch.distributed.reduce_scatter_tensor = lambda *given, **named: reduced.append("") or reduce(*given, **named)

    groups, validation = pickle.loads((folder / "groups.pkl").read_bytes())
    share = deal(groups, world)[rank]
    own = [groups[i] for i in share]
    found: dict = {"share": share, "sharded": is_sharded(model)}
    before = {name: own_part(parameter).clone() for name, parameter in model.named_parameters()}
    run, ran = GradientPass.run, []

    def counted(self: GradientPass, given: list, *more: object, **named: object) -> int:
        ran.append(len(given))
        return run(self, given, *more, **named)

    GradientPass.run = counted
    for basis in ("random", "fitted"):
        spec = SketchSpec(rank=4, dim=64, basis=basis, token_budget=64)
        ran.clear()
        files = worker.fit_sketcher(spec, groups, [])
        found["n_fitted"] = sum(ran)
        fitted = worker.sketch_groups(own)
        worker.use_sketcher(files.fingerprint, files.attachments, 64)
        found[basis] = {"files": files, "fitted": fitted, "used": worker.sketch_groups(own)}
    found["few"] = worker.sketch_groups(groups[:1] if rank == 0 else [])
    found["n_reduced"] = len(reduced)
    bench = [validation[i] for i in deal(validation, world)[rank]]
    found["aim"] = worker.aim(bench)
    found["probe"] = worker.probe_groups(own, None, None)
    found["again"] = worker.probe_groups(own, None, None)
    worker.aim(bench)
    found["carried"] = worker.probe_groups(own, None, found["probe"].calibration)
    reshard(model)
    after = {name: own_part(parameter) for name, parameter in model.named_parameters()}
    found["untouched"] = all(torch.equal(before[name], after[name]) for name in before)
    found["without_gradients"] = all(parameter.grad is None for parameter in model.parameters())
    (folder / f"rank-{rank}.pkl").write_bytes(pickle.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
