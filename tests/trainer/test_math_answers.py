"""The shortcuts of math_answers give what math-verify gives for the whole response."""

from random import Random

from gradstore.trainer.sampling.grading import read_truth
from gradstore.trainer.sampling.math_answers import decisive, math_equal, parse_answer

ANSWERS = ["42", "-7", "0", "-0", "007", "1,234", "1234", "3.5", "0.75", "\\frac{3}{4}", "\\frac34", "x^2+1", "1+x^2"]
ANSWERS += ["50\\%", "0.5", "\\sqrt{2}", "(1,2)", "\\{1,2\\}", "x=5", "5", "\\text{cm}", "5\\text{ cm}", "\\$5", "1e5"]
ANSWERS += ["2^{10}", "1024", "\\pi", "3.14", "", "\\text{foo}", "foo 3", "answer: 3", "(A)", "\\infty", "[0,1)"]
ANSWERS += ["12345678901234567", "999999999999999", "10^{15}", "a,b", "3 or 4", "5.0", "5.", "+5", "$5$", "{5}", "5 }"]
BEFORE = [
    "",
    "The answer is ",
    "so we get 41, no: ",
    "x = 5 and ",
    "$a=3$ ",
    "$$a=3$$ ",
    "\\[a\\] ",
    "\\[ a ",
    "\\(b\\) ",
]
BEFORE += ["text [1] ", "text [ ", "price is $5 ", "$", "$$", "\\[", "\\(", "final answer is ", "line\n", "\\$", "3"]
BEFORE += ["The final answer is: $7$. I hope it is correct. ", "{x} ", "\\boxed{9} ", "answer: 8 then "]
AROUND = [
    ("", ""),
    ("$", "$"),
    ("$$", "$$"),
    ("\\[", "\\]"),
    ("\\(", "\\)"),
    ("$ ", " $"),
    ("\\[\n", "\n\\]"),
    ("**", "**"),
]
AFTER = [
    "",
    " .",
    ".",
    "%",
    " percent",
    ", and 3",
    "\nDone.",
    " I hope it is correct.",
    " }",
    " $b$",
    " \\(c\\)",
    " [2] ",
]
AFTER += [" = 7", " and $3$", " so x=9"]


def _whole(gold: str, response: str) -> bool | None:
    """By math-verify, from the whole response."""
    from math_verify import verify

    named = read_truth(gold)
    if named is not None:
        return named.agrees(response)
    marked = "\\boxed" in gold or "$" in gold or not gold.strip()
    golden = parse_answer(gold if marked else f"\\boxed{{{gold}}}")
    return bool(verify(golden, parse_answer(response))) if golden else None


def test_shortcuts_give_what_math_verify_gives() -> None:
    """A reward that pays a wrong answer because of its surroundings is found by every policy."""
    random, taken, differing = Random(1), 0, []
    for _ in range(800):
        gold = random.choice(ANSWERS)
        answer = gold if random.random() < 0.4 else random.choice(ANSWERS)
        before = random.choice(BEFORE) + (random.choice(BEFORE) if random.random() < 0.2 else "")
        opening, closing = random.choice(AROUND)
        after = random.choice(AFTER) if random.random() < 0.6 else ""
        response = f"{before}{opening}\\boxed{{{answer}}}{closing}{after}"
        taken += decisive(response) is not None
        if math_equal(gold, response) != _whole(gold, response):
            differing.append((gold, response))
    assert differing == []
    assert taken > 250
