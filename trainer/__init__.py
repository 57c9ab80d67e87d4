"""Training with a selection each round: the embedded trainer, the rounds for any trainer, verl.

The public names are listed in `__init__.pyi` and load when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
