"""Rounds of selection inside TRL's GRPOTrainer, TRL itself unmodified (1.16 and newer).

    trainer = SelectingGRPOTrainer(..., selection={"store": "run/store", "ratio": 1 / 20, "steps": 10})

    selecting_trainer.py  the trainer, and the mixin for a trainer of your own
    settings.py           the settings of `selection=`, checked against TRL's
    rows.py               the data set's rows as problems
    order.py              the picks in the order in which TRL draws
    policy.py, rank.py    the policy for rounds: rollouts by TRL, sketches on its model
    lockstep.py           calls that every process makes together
    rollouts.py           TRL's batches as groups

docs/trl.md explains all. TRL is imported only when it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
