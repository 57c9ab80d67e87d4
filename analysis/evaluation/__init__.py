"""Evaluation of scores against training: LDS, mislabel detection, removal and retraining, tail patch.

Each evaluation takes plain arrays, so it works for any score; `score_matrix` computes them from a store.
"""
