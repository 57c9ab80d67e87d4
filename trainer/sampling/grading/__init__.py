r"""Grading of answers by the kind of their ground truth.

`read_truth` finds the kind; `grade` finds a response's final answer and compares the two.

    kind                    file            examples of truths
    labels                  labels.py       True, no, C, (C), C. it grows, \text{I}
    numbers, with units     quantities.py   1,234   3/4   1\frac12   \$5   5\text{ cm}^2   50\%   x = 3
    numbers in a base       truths.py       1010_2
    lists, sets, intervals  sequences.py    1, 2   \{1, 2\}   (1, 2)   [0, 1)   (-\infty, 3] \cup (4, 5)
    short text              words.py        \text{Wednesday}, east, \text{no solution}
    all other mathematics   expressions.py  2\sqrt3, x^2 + 1, y = 2x, matrices: by math-verify

Labels, numbers, lists of them and text are compared without math-verify, in microseconds. docs/rollouts.md has the
rules, with the published conventions they follow.
"""

from gradstore.trainer.sampling.grading.boxes import last_box
from gradstore.trainer.sampling.grading.expressions import interrupted
from gradstore.trainer.sampling.grading.truths import EXPECTED, Truth, grade, read_truth, readable, unreadable

__all__ = ["EXPECTED", "Truth", "grade", "interrupted", "last_box", "read_truth", "readable", "unreadable"]
