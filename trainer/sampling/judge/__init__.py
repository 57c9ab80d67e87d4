"""LLM judge: the reward for answers that no rule can compare.

Through any OpenAI-compatible endpoint, the judge is asked whether a response's final answer agrees with the ground
truth. Its reply must end in `VERDICT: CORRECT` or `VERDICT: INCORRECT`. Neither the response nor the endpoint is
trusted; a missing verdict is an error that names the problem, never a reward of 0.

    settings.py    model, endpoint, limits, and how a question is put
    question.py    what is sent: the final answer, between tags that a response cannot guess; how a reply is read
    judging.py     Judge: by rule first, then from the cache, then by the model, many questions at a time
    chat.py        a question as a chat completion, sent through ../endpoint.py
    cache.py       verdicts in a file, so that no question is asked twice

The API key comes from an environment variable; it is neither printed nor stored.
"""

from gradstore.trainer.sampling.judge.cache import Verdicts
from gradstore.trainer.sampling.judge.judging import Judge
from gradstore.trainer.sampling.judge.question import TEMPLATE, final_answer, verdict
from gradstore.trainer.sampling.judge.settings import JudgeSettings, judge_settings

__all__ = ["TEMPLATE", "Judge", "JudgeSettings", "Verdicts", "final_answer", "judge_settings", "verdict"]
