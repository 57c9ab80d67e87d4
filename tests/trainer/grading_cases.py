r"""Published conventions of grading as a table: (truth, response, agrees).

Sources: MATH (Hendrycks et al. 2021: `math_equivalence`), Minerva (Lewkowycz et al. 2022, appendix D.1), GSM8K (####),
MMLU-Pro and SuperGPQA (letters A to J), StrategyQA (True and False), AIME (000 to 999), SVAMP (145.0), Qwen2.5-Math and
DeepSeekMath (`math_equal`, several boxes), math-verify (six decimals, equations, sets).
"""


def boxed(*rows: tuple[str, str, bool]) -> list[tuple[str, str, bool]]:
    """Rows whose responses are boxed."""
    return [(truth, rf"Thus \boxed{{{answer}}}.", agrees) for truth, answer, agrees in rows]


NUMBERS = boxed(
    ("42", "42", True), ("42", "43", False), ("42", "-42", False), ("42", "420", False), ("42", "42.0", True),
    ("42", "42.5", False), ("42", "+42", True), ("-4", "−4", True), ("-4", "4", False), ("-4", "- 4", True),
    ("1,234", "1234", True), ("1234", "1,234", True), ("1234", "1{,}234", True), ("1234", r"1,\!234", True),
    ("1234", r"1\,234", True), ("1234", "1 234", True), ("1234", "12,34", False), ("1234", "1,235", False),
    (r"11,\!111,\!111,\!100", "11111111100", True), (r"11,\!111,\!111,\!100", "1111111110", False),
    ("073", "73", True), ("73", "073", True), ("073", "730", False), ("000", "0", True),  # AIME
    ("145.0", "145", True), ("145.0", "145.5", False), ("51.0", "51", True), ("51.0", "510", False),  # SVAMP
    ("0.5", ".5", True), (".5", "0.5", True), ("0.5", "0.50", True), ("0.5", "5", False), ("0.5", "0.05", False),
    ("0.5", r"\frac{1}{2}", True), (r"\frac{1}{2}", "0.5", True), (r"\frac{1}{2}", "2", False),
    (r"\frac12", r"\frac{1}{2}", True), (r"\frac 12", r"\frac{2}{4}", True), (r"\frac12", r"\frac{1}{12}", False),
    (r"\dfrac{3}{4}", r"\tfrac34", True), (r"\dfrac{3}{4}", "3/4", True), (r"\dfrac{3}{4}", "4/3", False),
    (r"-\frac{1}{3}", r"\frac{-1}{3}", True), (r"-\frac{1}{3}", r"\frac{1}{-3}", True),
    (r"-\frac13", r"\frac13", False),
    (r"1\frac{1}{2}", r"\frac{3}{2}", True), (r"\frac32", r"1\frac12", True), ("1 1/2", "1.5", True),
    (r"1\frac{1}{2}", r"\frac{1}{2}", False), (r"1\frac{1}{2}", r"\frac{11}{2}", False),
    (r"\frac{1}{3}", "0.333333", True), (r"\frac{1}{3}", "0.33", False), (r"\frac{2}{3}", "0.666667", True),
    (r"\frac{2}{3}", "0.666666", False), ("0.0000004", "0", False), ("0", "0.0000004", False),
    (r"0.\overline{3}", r"\frac13", True), (r"0.\overline{18}", r"\frac{2}{11}", True),
    (r"0.\overline{3}", "0.3", False),
    ("1000", "1e3", True), ("1e3", "1000", True), ("1e3", "1e4", False), ("2000", r"2 \times 10^{3}", True),
    (r"6.022 \times 10^{23}", r"6.022 \cdot 10^{23}", True), (r"6.022 \times 10^{23}", r"6.022 \times 10^{22}", False),
    ("1500000", "1.5 million", True), ("1500000", "1.5 billion", False), ("1024", "2^{10}", True),
    ("1024", "2^{9}", False),
    ("4", r"\sqrt{16}", True), ("4", r"\sqrt{2}", False), ("3", "x = 3", True), ("x = 3", "3", True),
    ("3", "x = 4", False),
    ("x = 3", "x=3", True), ("x = 3", "y = 3", False), ("5", "2 + 3 = 5", True), ("5", "5 = 6", False),
    ("5", "6 = 5", False), ("3.14", r"x \approx 3.14", True), (r"\frac{22}{7}", r"\frac{22}{7} \approx 3.14", True),
    ("5", r"\text{5}", True), ("5", r"\mathbf{5}", True), ("5", "$5$", True), ("5", r"\(5\)", True), ("5", "5.", True),
    ("5", "(5)", True), ("5", "{5}", True), (r"\boxed{5}", "5", True), ("$5$", "5", True), ("5", "5!", False),
    ("5", "5x", False), ("5", "x^5", False), ("5", r"\pm 5", False), ("5", "five", False), ("5", "", False),
)  # fmt: skip

UNITS = boxed(
    (r"\$32,\!348", "32348", True), (r"\$32,\!348", r"\$32,348", True), (r"\$32,\!348", "32,349", False),
    (r"\$ 6.25", "6.25", True), (r"\$ 6.25", r"\$6.25", True), (r"\$ 6.25", r"6.25 \text{ dollars}", True),
    (r"\$ 6.25", "625", False), (r"\$ 6.25", r"6.25 \text{ euros}", False), (r"\$5", "$5", True), ("5", r"\$5", True),
    (r"-\$5", r"\$-5", True), (r"-\$5", r"\$5", False), ("5 dollars", r"\$5", True), ("5 dollars", "5 cents", False),
    ("5 km", "5", True), ("5 km", r"5\text{ km}", True), ("5 km", "5 kilometers", True), ("5 km", "5km", True),
    ("5 km", "5 miles", False), ("5 km", "5000", False), ("5", "5 km", True), ("5", "6 km", False),
    (r"5\text{ cm}^2", "5", True), (r"5\text{ cm}^2", r"5 \text{ square centimeters}", True),
    (r"5\text{ cm}^2", r"5\ \mathrm{cm}^{2}", True), (r"5\text{ cm}^2", "5 cm²", True),
    (r"5\text{ cm}^2", r"5\text{ m}^2", False), (r"5\text{ m}", "5m", True), (r"5\text{ m}", "5x", False),
    (r"90^\circ", "90", True), (r"90^\circ", r"90^{\circ}", True), (r"90^\circ", "90°", True),
    (r"90^\circ", "90 degrees", True), (r"90^\circ", "90 radians", False), (r"90^\circ", "9", False),
    ("90", r"90^\circ", True), (r"25^\circ\text{C}", r"25^\circ C", True), (r"25^\circ\text{C}", r"25^\circ F", False),
    (r"50\%", "50", True), ("50", r"50\%", True), (r"50\%", "0.5", True), ("0.5", r"50\%", True),
    (r"50\%", r"\frac12", True), (r"50\%", "50 percent", True), (r"50\%", "5000", False), (r"50\%", r"0.5\%", False),
    ("0.5", "50", False), (r"50\%", r"50^\circ", False), (r"12\text{ ways}", "12", True),
    ("12", "12 different ways", True),
    ("12", "13 ways", False), (r"60\text{ mph}", "60 miles per hour", True), (r"60\text{ mph}", "60 km/h", False),
    (r"8\text{ a.m.}", "8 am", True), (r"8\text{ a.m.}", "8 pm", False), (r"5^{\text{th}}", "5", True),
    ("5", "5th", True),
    (r"12\pi\text{ cubic inches}", r"12\pi", True), (r"12\pi\text{ cubic inches}", r"12\pi \text{ in}^3", True),
    (r"12\pi\text{ cubic inches}", r"12\pi \text{ cm}^3", False),
    (r"\frac{9\pi}{2}", r"\frac{9\pi}{2}\text{ units}", True),
    (r"\frac{9\pi}{2}", r"\frac{9\pi}{4}\text{ units}", False), (r"\frac{9\pi}{2}", r"4.5\pi", True),
)  # fmt: skip

BASES = boxed(
    ("1010_2", "1010_2", True), ("1010_2", "1010_{2}", True), ("1010_2", r"1010_{\text{two}}", True),
    ("1010_2", "1010", True), ("1010_2", "1010_8", False), ("1010_2", "10", False), ("1010_2", "1011_2", False),
    ("2516_8", "(2516)_8", True), ("2516_8", "1358", False), ("4", "4_5", True), ("4", "3_5", False),
)  # fmt: skip
"""MATH compares the text, math-verify drops the base; here it may be left out, and must agree where both write it."""

INTERVALS = boxed(
    ("[0, 1)", "[0,1)", True), ("[0, 1)", "[0,1]", False), ("[0, 1)", "(0,1)", False), ("[0, 1)", "(0,1]", False),
    ("[0, 1)", "0, 1", False), ("[0, 1)", r"\{0, 1\}", False), ("[0, 1)", r"0 \le x < 1", True),
    ("[0, 1)", "0 < x < 1", False), ("[0, 1)", r"x \in [0, 1)", True), ("[0, 1)", r"\left[0, \frac{2}{2}\right)", True),
    ("[0, 1)", "[0, 2)", False), (r"(-\infty, 3]", r"(-\infty,3]", True), (r"(-\infty, 3]", r"(-\infty,3)", False),
    (r"(-\infty, 3]", r"x \leq 3", True), (r"(-\infty, 3]", "x < 3", False), (r"(-\infty, 3]", r"[3, \infty)", False),
    (r"x \ge 3", r"[3, \infty)", True), (r"x \ge 3", r"3 \le x", True), (r"x \ge 3", "x > 3", False),
    (r"x \ge 3", "3", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty, 2)", True),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty) \cup (-\infty, 2]", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty, 2)", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"x < 2 \text{ or } x > 3", True),
    (r"\left[ -\frac{\pi}{2}, \frac{\pi}{2} \right]", r"[-\pi/2, \pi/2]", True),
    (r"\left[ -\frac{\pi}{2}, \frac{\pi}{2} \right]", r"[-\pi, \pi]", False),
)  # fmt: skip

LISTS = boxed(
    ("1, 2, 3", "3, 2, 1", True), ("1, 2, 3", "1,2,3", True), ("1, 2, 3", "1, 2", False),
    ("1, 2, 3", "1, 2, 3, 4", False),
    ("1, 2, 3", "1, 2, 4", False), ("1, 2, 3", "123", False), ("1, 2", r"1 \text{ and } 2", True),
    ("1, 2", "1 or 2", True),
    ("1, 2", r"x = 1 \text{ or } x = 2", True), ("1, 2", r"x = 1, 3", False), ("1, 2", r"\{1, 2\}", True),
    ("1, 2", "1", False),
    ("1, 1", "1, 2", False), (r"\{1,2\}", "2, 1", True), (r"\{1,2\}", r"\{2,1\}", True), (r"\{1,2\}", "(1,2)", False),
    (r"\{1,2\}", r"\{1,2,3\}", False), ("(1,2)", "(1, 2)", True), ("(1,2)", r"\left(1, \frac42\right)", True),
    ("(1,2)", "(2,1)", False), ("(1,2)", r"\{1,2\}", False), ("(1,2)", "[1,2]", False), ("(1,2)", "1, 2", True),
    ("(1,2)", "2, 1", False), ("(1,2)", "(1,2,3)", False), ("(1,2)", "(x, y) = (1, 2)", True), ("(1,2)", "3", False),
    ("(1,2),(3,4)", "(3,4), (1,2)", True), ("(1,2),(3,4)", "(2,1), (3,4)", False), (r"\pm 2", "2, -2", True),
    ("2, -2", r"\pm 2", True), (r"\pm 2", "2", False), (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}, 1 - \sqrt{19}", True),
    (r"1 \pm \sqrt{19}", r"1 + \sqrt{19}", False), (r"1 \pm \sqrt{19}", r"1 \pm \sqrt{18}", False),
    ("x=1, y=2", "y = 2, x = 1", True), ("x=1, y=2", "x = 2, y = 1", False), ("x=1, y=2", "1, 2", True),
    ("x=1, y=2", "2, 1", False), ("1,000, 2,000", "2000, 1000", True), ("100,200,300", "100, 200, 300", True),
    ("100,200,300", "100, 200, 301", False), ("A, C", "C and A", True), ("A, C", "A", False),
    ("A, C", "A, B, C", False),
    (r"\text{Monday and Tuesday}", "Tuesday, Monday", True), (r"\text{Monday and Tuesday}", "Monday", False),
    ("5", "5, 6", False), ("5", "5 or 6", False), ("5", r"5 \text{ or } 6", False), ("5", "(5, 6)", False),
    ("5", r"\{5\}", False), ("x^2", "x^2, x^3", False),
)  # fmt: skip

TEXTS = boxed(
    (r"\text{Wednesday}", "Wednesday", True), (r"\text{Wednesday}", r"\text{wednesday}", True),
    (r"\text{Wednesday}", r"\textbf{Wednesday}.", True), (r"\text{Wednesday}", "Thursday", False),
    (r"\text{Wednesday}", "Wednesday or Thursday", False), (r"\text{Wednesday}", "not Wednesday", False),
    (r"\text{east}", "the east", True), (r"\text{east}", "west", False), ("east", r"\text{East}", True),
    ("east", "northeast", False), (r"\text{10:30 a.m.}", "10:30 am", True), (r"\text{10:30 a.m.}", "10:30 pm", False),
    (r"\text{June 20}", "june 20", True), (r"\text{June 20}", "june 2", False),
    (r"\text{no solution}", "No solution", True),
    (r"\text{no solution}", "solution", False), (r"\text{Navin}", "Navin, because he won", True),
    (r"\text{Navin}", "Luann", False),
    (r"\text{San Diego}", r"\text{San} \text{ Diego}", True), (r"\text{San Diego}", "Diego", False),
)  # fmt: skip

EXPRESSIONS = boxed(
    (r"2\sqrt{3}", r"\sqrt{12}", True), (r"2\sqrt{3}", r"\sqrt{13}", False), (r"11\sqrt2", r"11\sqrt{2}", True),
    ("x^2+1", "1+x^2", True), ("x^2+1", "x^2-1", False), ("(x+3)(x-2)", "x^2+x-6", True),
    ("(x+3)(x-2)", "x^2-x-6", False),
    ("y = 2x + 3", "2x + 3", True), ("y = 2x + 3", "2x - 3", False), ("y = 2x + 3", "y=3+2x", True),
    ("a + b - c", "a+b", False),
    ("3+4i", "4i + 3", True), ("3+4i", "3-4i", False), (r"6\pi", "18.849556", True), (r"6\pi", "18.8", False),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", False),
    (r"\infty", r"\infty", True), (r"\infty", r"-\infty", False), (r"\emptyset", r"\varnothing", True),
    (r"\emptyset", "0", False),
    ("3:4", "3 : 4", True), ("3:4", "4:3", False), (r"\overline{AB}", r"\overline{AB}", True),
    (r"\overline{AB}", r"\overline{AC}", False),
    (r"\angle ABC", r"\angle ABC", True), (r"\angle ABC", r"\angle BAC", False), ("x", "x", True), ("x", "y", False),
    ("5", r"9^9\infty", False), (r"\sqrt{5}", r"\infty", False),
    (r"A \subset B", r"A\subset B", True), (r"A \subset B", r"B \subset A", False), (r"\frac{x}{y}", "x/y", True),
)  # fmt: skip

RESPONSES = [
    # GSM8K's form, Minerva's closing, the last number (Qwen2.5-Math)
    ("72", "48/2 = <<48/2=24>>24, 48+24 = <<48+24=72>>72 altogether.\n#### 72", True),
    ("24", "He has 24.\n#### 72", False),
    ("3", "Final Answer: The final answer is $3$. I hope it is correct.", True),
    (r"\text{east}", r"Final Answer: The final answer is $\text{east}$. I hope it is correct.", True),
    ("42", "The answer is 42.", True), ("42", "The answer is 42 because 6 * 7 = 42, not 41.", True),
    ("41", "The answer is 42, not 41.", False),
    ("42", "**Answer:** 42", True), ("42", "so we get 41, no: 42", True), ("41", "so we get 41, no: 42", False),
    ("42", "There are 42 ways.\n\nHope this helps!", True), ("5", "She pays $5.", True),
    ("5", "She pays $5 and earns $7 a day.", False),
    ("3", "Thus x = 7 - 4 = 3", True), ("-4", "Thus x = 7 - 4", False), ("1234", "It is $1,234.00 in total.", True),
    ("5 km", "The distance is 5 miles", False), ("5 km", "The distance is 5 km.", True), ("3", "so y = 3x", False),
    ("2", r"we get \sqrt{2}.", False),
    (r"\sqrt{2}", r"we get \sqrt{2}.", True), (r"\frac{1}{2}", r"we get $\frac{1}{2}$, as wanted.", True),
    ("x^2+1", "The polynomial is x^2 + 1.", True),
    ("1, 2", "The roots are 1 and 2.", True), ("1, 2", "The roots are $1$ and $2$.", True),
    ("2", "The roots are 1 and 2.", False),
    ("(1,2)", "The point is (1, 2).", True), ("2", "The point is (1, 2).", False),
    ("[0, 1)", "The answer is [0, 1).", True),
    ("9", "<answer>9</answer>", True), ("9", "The answer is 9</s>", True), ("42", "I do not know", False),
    ("42", "", False),
    # the last box; several boxes
    ("5", r"\boxed{3} no, \boxed{5}", True), ("3", r"\boxed{3} no, \boxed{5}", False),
    ("5", r"\boxed{5} although 6 is close", True),
    ("5", r"\boxed{5} or \boxed{6}", False), ("6", r"\boxed{5} or \boxed{6}", False),
    ("5", r"\boxed{5}, \boxed{5}", True),
    ("B", r"\boxed{A} or \boxed{B}", False), ("B", "\\boxed{A}\n\\boxed{B}", False),
    ("B", r"$\boxed{A}$ and $\boxed{B}$", False),
    ("B", r"\boxed{A, B, C, D}", False), ("B", r"\boxed{(B) or (C)}", False),
    ("B", r"first \boxed{A}, on reflection \boxed{B}", True),
    ("1, 2", r"\boxed{1} and \boxed{2}", True), ("1, 2", r"\boxed{2}, \boxed{1}", True),
    ("1, 2", r"\boxed{1} and \boxed{3}", False),
    ("1, 2", r"\boxed{1}, \boxed{2}, \boxed{3}", False),
    ("1, 2", r"One root is \boxed{1}. The other is \boxed{2}.", True),
    ("1, 2", r"One root is \boxed{1}. The other is \boxed{3}.", False), ("1, 2", r"\boxed{1, 2}", True),
    ("(1,2)", r"\boxed{1} and \boxed{2}", True), ("(1,2)", r"\boxed{2} and \boxed{1}", False),
    # boxes that are not closed, empty, inside another
    ("5", r"\boxed{5", False), ("5", r"\boxed{5} \boxed{", False), ("5", r"\boxed{5}, as said in \boxed{}", False),
    ("5", r"\boxed{}", False),
    ("5", r"\boxed{\boxed{5}}", True), ("5", r"\boxed{\boxed{5}, 6}", False), ("5", r"\boxed 5", True),
    ("5", r"\fbox{5}", True),
    (r"\frac{1}{2}", r"\[ \boxed{\frac{1}{2}} \]", True), ("5", r"\boxed{\text{so } 5}", False),
    (r"\{1,2\}", r"\boxed{\{1,2\}}", True),
    # everything at once
    ("5", r"\boxed{1, 2, 3, 4, 5, 6}", False), ("5", "\\boxed{5}\n\\boxed{6}", False),
    ("5", r"\boxed{5 \neq 6}", False), ("5", r"\boxed{x > 5}", False),
    ("5", r"\boxed{5 \text{ if } x > 0 \text{ else } 6}", False), ("True", r"\boxed{True and False}", False),
    ("C", r"\boxed{ABCDEFGHIJ}", False),
]  # fmt: skip

MATH_TRUTHS = [
    r"\$32,\!348", r"\$ 6.25", r"\$18.90", r"\$0.08", r"18.90", r"5\text{ cm}", r"144\text{ cm}^2",
    r"12\pi \text{ cubic inches}", r"6 \text{ inches}", r"70 \text{ miles}", r"110^\circ", r"60^{\circ}", r"25\%",
    r"12.5 \%", r"75 \text{ students}", r"10,\!000", r"11,\!111,\!111,\!100", r"\frac{9}{19}", r"\frac 59",
    r"\frac43", r"\dfrac{7}{4}", r"-\frac{1}{3}", r"\frac{-3}{2}", r"1\frac{4}{5}", r"4\frac{1}{2}\text{ hours}",
    r".0625", r"0.\overline{18}", r"0.1\overline{6}", r"10^{-3}", r"2^{2005}", r"6.022 \times 10^{23}", r"1010_2",
    r"2516_8", r"4343_6", r"AF_{16}", r"204_5", r"(-\infty, 2) \cup (3, \infty)", r"[-2,7]", r"(3, \frac{\pi}{2})",
    r"\left( 3, \frac{\pi}{2} \right)", r"(0,9)\cup (9,36)", r"[0,\infty)",
    r"\left[ -\frac{\pi}{2}, \frac{\pi}{2} \right]", r"(-\infty,-8)\cup (8,\infty)", r"1, -2", r"-2,1", r"1,2,3",
    r"\{1,2,3\}", r"1 \pm \sqrt{19}", r"\pm 3", r"3, 5, 7, 9", r"1 \text{ and } 4", r"\frac{1}{2}, \frac{1}{3}",
    r"2\sqrt{3}, -2\sqrt{3}", r"(1,2),(3,4)", r"(2,-1)", r"(-1, 2, 3)", r"\text{Wednesday}", r"\text{east}",
    r"\text{Navin}", r"\text{hyperbola}", r"\text{odd}", r"\text{Briana}", r"\text{June 20}", r"\text{10:30 a.m.}",
    r"\text{no solution}", r"\text{(A)}", r"\text{(D)}", r"\text{A, C}", r"\text{Monday and Tuesday}",
    r"\text{ellipse}", r"\text{Yes}", r"\text{No}", r"\text{E}", r"\textbf{(B)}\ 12", r"\text{even}",
    r"\text{neither}", r"\text{inside}", r"\text{San Diego}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
    r"\begin{pmatrix} 1 \\ -2 \\ 3 \end{pmatrix}", r"\begin{bmatrix} 2 & 3 \\ 4 & 5 \end{bmatrix}",
    r"\begin{pmatrix} 1/5 & -2/5 \\ -2/5 & 4/5 \end{pmatrix}", r"x^2 - 2x + 1", r"(x+3)(x-2)", r"x^3+3x-6",
    r"3x + 4y = 12", r"y = 2x + 3", r"x = 3", r"x=1, y=2", r"f(x) = x^2 + 1", r"2x^2 - 3x + 5 = 0", r"\sqrt{2}",
    r"2\sqrt{3}", r"\frac{\sqrt{3}}{2}", r"\sqrt[3]{4}", r"3+4i", r"-6 - 4i", r"e^{i\pi/4}", r"\pi",
    r"\frac{9\pi}{2}", r"12\pi", r"\log_2 3", r"\sin 10^\circ", r"\cot x", r"\infty", r"\emptyset", r"\binom{10}{3}",
    r"10!", r"n^2 + n", r"a + b - c", r"\frac{a+b}{2}", r"x \le 3", r"-2 < x < 5", r"x > 7", r"x \in [0, 1)", r"3:4",
    r"2:3:5", r"10\!:\!30", r"p - q", r"\frac{3}{56}", r"\lfloor x \rfloor", r"\overline{AB}", r"\angle ABC",
    r"A \subset B", r"\mathbb{R}", r"\frac{1}{2} \text{ or } -1", r"5 \sqrt{2} \text{ cm}", r"(\sec x, \tan x)",
    r"\left(\frac{1}{3}, -2\right)", r"6-5i", r"11\sqrt2", r"3\sqrt{13}", r"-50", r"+7", r"\boxed{7}",
    r"$\boxed{\frac{1}{2}}$", r"\(x^2\)", r"\mathbf{v} = \begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"60\text{ mph}",
    r"\text{1,000 dollars}", r"50 \text{ cents}", r"\text{\$} 5", r"\mathdollar 5", r"\frac{8}{15}\text{ of the pie}",
    r"2\text{ feet}, 3\text{ inches}", r"\text{The graph is a circle}", r"\text{Converges}", r"12 \text{ or } 13",
    r"C = 2\pi r", r"k=-\frac{1}{2}", r"\left(-\infty,\frac12\right]", r"0<a\leq 1", r"\frac{x}{y}", r"ab + bc + ca",
    r"\text{If } x > 0 \text{ then } y", r"5^{\text{th}}", r"\text{ninth}", r"9^{th}", r"\sqrt{x^2+1}+C",
    r"\frac{x^3}{3} + C", r"\cos^2 x - \sin^2 x", r"\text{I}", r"\text{II}", r"\text{none}", r"(a,b,c)",
    r"\text{undefined}", r"8\text{ a.m.}",
]  # fmt: skip
"""Forms of truths as MATH publishes them."""

UNREADABLE = [
    "",
    "   ",
    "the $ sign",
    "\\boxed{",
    "\\boxed{5",
    "\\frac{",
    "?",
    "a long explanation " * 20,
    "1" * 3000,
    "(1," * 600 + ")" * 600,
]
