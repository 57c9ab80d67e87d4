"""Gradients to sketches, targets, search and selection, over a gradstore store.

The public names are listed in `__init__.pyi` and load when first used, so that searching a store does not wait for
torch.
"""

from gradstore import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
