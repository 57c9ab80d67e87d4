"""Problem files from public data sets and from reasoning-gym, mixed, cleaned, and spoiled on purpose for studies.

`gradstore.trainer.data.pool.build` does it all; `gradstore data` is its command line. docs/data.md lists the data sets.
"""
