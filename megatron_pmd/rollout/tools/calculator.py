"""The worked example of a rollout function: the model may compute with Python before it answers.

Set `rollout.function=megatron_pmd.rollout.tools.calculator:rollout`, and tell the model (data.system_prompt):
"You can compute: write a Python block (```python ... ```) and end your turn; you are then shown what it
prints. Give your final answer without such a block."
"""

from __future__ import annotations

import re
from functools import partial

from megatron_pmd.rollout.episode import Episode
from megatron_pmd.rollout.tools.python import run_python

_BLOCK = re.compile(r"```python\s*\n(.*?)```", re.DOTALL)


async def rollout(episode: Episode) -> str:
    """Turns until one has no Python block, or there is no room for another; the last one's text is graded."""
    answer = await episode.generate()
    while answer.finish == "stop" and (code := last_block(answer.text)) is not None and episode.can_go_on:
        # a user's message: not every chat template knows the role `tool`
        await episode.insert_message("user", partial(_shown, code))
        answer = await episode.generate()
    return answer.text


def last_block(text: str) -> str | None:
    """The code in the last Python block of a turn; None if it has none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else None


async def _shown(code: str) -> str:
    return f"Output:\n{await run_python(code)}"
