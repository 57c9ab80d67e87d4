"""Training with a selection each round: the embedded trainer, the rounds for any trainer, verl.

The public names are listed in `__init__.pyi` and load when first used.
"""

from gradstore import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
