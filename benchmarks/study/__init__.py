"""Study: does selection by alignment train better? The embedded trainer on the demo's model, with hard pools.

Four arms (arms.py), a dozen selection methods (methods.py), several seeds. Each run appends one row to a file of
results, so the study can be stopped at any time and resumed. `python -m benchmarks.study --help`; report.py makes
docs/study.md from the rows.
"""
