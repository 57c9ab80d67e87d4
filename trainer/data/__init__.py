"""Build problem files from public data sets and reasoning-gym: mix, deduplicate, and corrupt on purpose for studies.

Entry point: `gradstore.trainer.data.pool.build`; command line: `gradstore data`. docs/data.md lists the data sets.
"""
