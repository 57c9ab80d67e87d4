"""Rounds of selection inside verl 0.9.x, verl itself unmodified.

    entry.py              the command, and the task runner for your own entry module
    selecting_trainer.py  verl's trainers (sync, colocate_async): rounds between steps, observed steps, resume
    objective.py          the sketches' objective, as verl's configuration states it
    sampler.py            the data loader's order, saved in verl's checkpoints
    live_policy.py        the policy for rounds: rollouts by verl, sketches in the workers
    worker.py             verl's actor worker with sketches and probes
    agent_loop.py         a seed for every rollout
    transfer.py           verl's queue of rollouts
    sampler_07.py         verl 0.7.x, through data.sampler.class_path

docs/verl.md has the settings and complete commands. verl is imported only when it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
