"""Analyses of a curriculum from a store alone; each function returns a tidy pandas frame (docs/analysis.md).

from gradstore.analysis.alignment import alignment
frame = alignment(store, "pool", "benchmark")      # one row per problem and step
plots.alignment(frame).show()                      # gradstore.analysis.plots has a figure for each frame
"""
