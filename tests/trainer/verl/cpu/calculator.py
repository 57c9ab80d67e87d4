"""A tool for verl's agent loop, and a parser for which every turn calls it, so that a model without training has turns.

verl loads this file in its agent loop workers (rollout.multi_turn.function_tool_path); the parser is its format
`every_turn`.
"""

import json
from typing import Any

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool


@function_tool
def calculate(expression: str) -> str:
    """Add up the digits of a text.

    Args:
        expression: The text.
    """
    return str(sum("0123456789".index(character) for character in expression if character in "0123456789"))


@ToolParser.register("every_turn")
class EveryTurn(ToolParser):
    """The whole turn is the tool's argument."""

    async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids)
        return text, [FunctionCall(name="calculate", arguments=json.dumps({"expression": text}))]
