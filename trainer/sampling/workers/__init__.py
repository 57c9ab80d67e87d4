"""Processes that grade answers which nobody has vouched for: no secrets, no network, no files, limits on everything.

    trainer process          pool.py       starts keepers, sends batches, reads scores
      keeper (keeper.py)     own process   imports the verifiers once; no answer is ever parsed or run here
        grader (grader.py)   forked        closes the doors (confinement.py), then grades one answer after another

A grader that overruns its time, its memory or ends is killed and forked anew from its keeper, within milliseconds. Its
answer then scores 0 with a reason. Frames of JSON (frames.py) go through pipes; nothing is ever unpickled.
expressions.py and auditing.py keep the verifiers from running an answer as code.
"""
