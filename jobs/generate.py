"""``mmada generate``: text from a checkpoint, as it is made."""

from __future__ import annotations

import sys

from cluster.errors import ClusterError
from jobs.checkpoint_folder import holds_reward_model, model_folder
from jobs.quiet_transformers import quiet_transformers


def run(checkpoint: str, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> int:
    """Print ``prompt`` and its continuation; text appears as it is decoded."""
    folder = model_folder(checkpoint)
    if holds_reward_model(folder):
        raise ClusterError(
            f"checkpoint={checkpoint} holds a reward model, which writes nothing; give a language model, or score "
            "pairs with mmada evaluate"
        )
    from mmada.generate import stream_text

    with quiet_transformers():
        pieces = stream_text(
            folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()
    return 0
