"""Study: does selection by alignment train better? The embedded trainer, with pools that teach little at random.

Two beds (bed.py): the demo's model (toy.py) and SmolLM2-135M with word problems (words.py). Three or four arms, a
dozen selection methods (methods.py), several seeds. Each run appends one row to a file of results, so the study can be
stopped at any time and resumed. intervention.py asks whether scores mean what they say. `python -m benchmarks.study
--help`; report.py makes docs/study.md and docs/study-toy.md from the rows.
"""
