"""Analyses of a curriculum from a store alone; each function returns a tidy pandas frame (docs/analysis.md).

    from gradstore.analysis import alignment, plots
    frame = alignment.alignment(store, "pool", "benchmark")    # one row per problem and step
    plots.alignment(frame).show()                              # plots has a figure for each frame

The modules are listed in `__init__.pyi` and load when first used.
"""

from gradstore import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
