"""Does selection by alignment train better? The embedded trainer on the demo's model, in regimes that selection is for.

Four arms (arms.py), a dozen ways to pick (methods.py), several seeds; each run appends one row to a file of results, so
the study can be stopped at any time and goes on where it was. `python -m benchmarks.study --help`; docs/study.md is
made from the rows (report.py).
"""
