"""What a store says about a curriculum: functions on a store alone that return tidy pandas frames (docs/analysis.md).

from gradstore.analysis.alignment import alignment
frame = alignment(store, "pool", "benchmark")      # one row a problem and step
plots.alignment(frame).show()                      # gradstore.analysis.plots has a figure for each frame
"""
