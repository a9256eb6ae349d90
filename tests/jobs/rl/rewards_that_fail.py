"""A reward function whose behaviour a file decides, which its actors read at every call."""

import math
import time
from pathlib import Path

MODE = Path(__file__).with_name("mode")


def length(prompts, completions, index, **kwargs):
    """The bytes of a completion; what the mode says goes wrong, does so on problems whose number 4 divides."""
    mode = MODE.read_text() if MODE.exists() else "well"
    rewards = [float(len(completion)) for completion in completions]
    marked = [i for i, number in enumerate(index) if number % 4 == 0]
    if mode == "slow":
        time.sleep(0.3)
    if mode == "raises" and marked:
        raise RuntimeError("the scorer is out of order")
    if mode == "hangs" and marked:
        time.sleep(600)
    if mode == "nan":
        rewards = [math.nan if i in marked else reward for i, reward in enumerate(rewards)]
    if mode == "one number":
        return 1.0
    if mode == "too few":
        return rewards[:-1]
    return rewards
