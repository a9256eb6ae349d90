"""A saved model as a function from a table to a table: what ``mlflow.pyfunc.load_model`` loads.

MLflow finds ``_load_pyfunc`` by its name and enforces the signature before it calls ``predict``; nothing here imports
MLflow. A language model continues prompts and says how likely continuations are, a reward model scores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmada.data.task_rows import prompt_ids
from mmada.generate import SamplingSettings, generate_batch, score_cached
from mmada.reward_model import COMPONENTS, MMaDARewardModel

# name -> (MLflow's type, whether it must be given)
Columns = Mapping[str, tuple[str, bool]]

TEXT_INPUTS: Columns = {"prompt": ("string", True), "completion": ("string", False)}
TEXT_OUTPUTS: Columns = {"completion": ("string", True), "log_likelihood": ("double", True)}
TEXT_PARAMS: dict[str, int | float] = {"max_new_tokens": 200, "temperature": 0.8, "top_p": 0.95, "seed": 0}

REWARD_INPUTS: Columns = {"prompt": ("string", True), "completion": ("string", True)}
REWARD_OUTPUTS: Columns = {name: ("double", True) for name in ("reward", "confidence", *COMPONENTS)}


class TextModel:
    """A language model. Columns and parameters are ``TEXT_INPUTS``, ``TEXT_OUTPUTS`` and ``TEXT_PARAMS``."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Per row: ``completion``, the given one or one sampled, and its ``log_likelihood``.

        That is the natural logarithm of the completion's probability behind the prompt, at temperature 1, its end
        not counted. The same seed gives a prompt the same completion on the same machine.

        Raises ValueError for a prompt that is empty or leaves no room, as ``generate_batch`` does.
        """
        settings = {**TEXT_PARAMS, **(params or {})}
        seed = int(settings.pop("seed"))
        sampling = SamplingSettings(**settings)
        prompts = [prompt_ids(self.tokenizer, prompt) for prompt in model_input["prompt"]]
        texts = [text if isinstance(text, str) else None for text in _column(model_input, "completion", len(prompts))]
        answers = [[] if text is None else self._ids(text) for text in texts]
        unsaid = [row for row, text in enumerate(texts) if text is None]
        if unsaid:
            sampled = generate_batch(
                self.model, [prompts[row] for row in unsaid], sampling, seeds=[[seed]] * len(unsaid)
            )
            ends = _end_ids(self.model)
            for row, (completion,) in zip(unsaid, sampled, strict=True):
                answers[row] = [token for token in completion.ids if token not in ends]
                texts[row] = self.tokenizer.decode(answers[row], skip_special_tokens=True)
        said = [row for row, ids in enumerate(answers) if ids]
        scores = score_cached(self.model, [prompts[row] for row in said], [answers[row] for row in said])
        likelihoods = dict(zip(said, map(sum, scores), strict=True))
        found = {"completion": texts, "log_likelihood": [float(likelihoods.get(row, 0.0)) for row in range(len(texts))]}
        return type(model_input)(found)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class RewardModel:
    """A reward model. Columns are ``REWARD_INPUTS`` and ``REWARD_OUTPUTS``."""

    def __init__(self, folder: Path) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = MMaDARewardModel.from_pretrained(folder).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Per row: the normalised reward of a completion, the confidence in it, and its components."""
        scored = self.model.score(self.tokenizer, list(model_input["prompt"]), list(model_input["completion"]))
        found = {"reward": [each.reward for each in scored], "confidence": [each.confidence for each in scored]}
        found |= {name: [each.components[name] for each in scored] for name in COMPONENTS}
        return type(model_input)(found)


def _load_pyfunc(path: str) -> TextModel | RewardModel:
    """The model that a Hugging Face folder holds; called by MLflow."""
    from mmada.config import MMaDAConfig

    is_reward = "MMaDARewardModel" in (MMaDAConfig.from_pretrained(path).architectures or [])
    return RewardModel(Path(path)) if is_reward else TextModel(Path(path))


def _column(table: Any, name: str, length: int) -> Sequence[Any]:
    return list(table[name]) if name in table else [None] * length


def _end_ids(model: Any) -> set[int]:
    end = model.config.eos_token_id
    return set() if end is None else set(end) if isinstance(end, (list, tuple)) else {end}
