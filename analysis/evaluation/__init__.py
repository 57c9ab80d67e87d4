"""Do scores say what training says? LDS, mislabel detection, removal and retraining, one step on the best problems.

Each judge takes plain arrays, so that anything a store scores can be judged; `score_matrix` gets them from a store.
"""
