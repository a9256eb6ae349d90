"""The same completions through transformers' ``generate``: what ours is compared with.

# B rows of a group, T columns
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from mmada.generation.decoder import Decoder
from mmada.generation.rollouts import check_prompts, end_ids, seeds_for
from mmada.generation.sampling import pick, tempered
from mmada.generation.settings import Completion, SamplingSettings
from mmada.generation.stopping import watch


class StopTexts(StoppingCriteria):
    """Ends rows whose text after the prompt holds a stop text."""

    def __init__(self, num_rows: int, settings: SamplingSettings, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._watches = [watch(settings.stop, tokenizer) for _ in range(num_rows)]
        self._has_stopped = [False] * num_rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            own = self._watches[row]
            self._has_stopped[row] |= own is not None and own.push(token)
        return torch.tensor(self._has_stopped, device=input_ids.device)


def generate_reference(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seeds: Sequence[Sequence[int]] | None,
    slots: int = 32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[Completion]]:
    """As ``generate_batch``, by ``model.generate``: rows padded on the left, ``slots`` at a time, until the last ends.

    ``seeds`` say how many samples of each prompt there are; the noise is torch's own.
    """
    decoder = Decoder(model)
    check_prompts(decoder.config, prompts, [settings.max_new_tokens] * len(prompts))
    seeds = seeds_for(prompts, seeds)
    wanted = [prompt for prompt, own in enumerate(seeds) for _ in own]
    completions: list[list[Completion]] = [[] for _ in prompts]
    for begin in range(0, len(wanted), slots):
        group = wanted[begin : begin + slots]
        made = _generate_group(decoder, [prompts[prompt] for prompt in group], settings, tokenizer)
        for prompt, completion in zip(group, made, strict=True):
            completions[prompt].append(completion)
    return completions


def _generate_group(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Completion]:
    longest, ends = max(map(len, prompts)), end_ids(decoder.config)
    ids_BT = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts], device=decoder.device)
    first_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=decoder.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
        }
    output = decoder.model.generate(
        ids_BT,
        attention_mask=(torch.arange(longest, device=decoder.device) >= first_B[:, None]).long(),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
        stopping_criteria=[StopTexts(len(prompts), settings, tokenizer)],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **sampling,
    )
    new_BT = output.sequences[:, longest:]
    logprobs, sampling_logprobs = [], []
    for column, (logits_BV, scores_BV) in enumerate(zip(output.logits, output.scores, strict=True)):
        tokens_B = new_BT[:, column]
        logprobs.append(pick(tempered(logits_BV, settings.temperature).log_softmax(dim=-1), tokens_B))
        drawn_B = pick(tempered(scores_BV, 1.0).log_softmax(dim=-1), tokens_B)
        sampling_logprobs.append(drawn_B if settings.temperature > 0 else torch.zeros_like(drawn_B))
    columns = (torch.stack(each, dim=1).tolist() for each in (logprobs, sampling_logprobs))
    return [
        _cut(ids, own, sampling, settings, ends, tokenizer)
        for ids, own, sampling in zip(new_BT.tolist(), *columns, strict=True)
    ]


def _cut(
    ids: list[int],
    logprobs: list[float],
    sampling_logprobs: list[float],
    settings: SamplingSettings,
    ends: frozenset[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Completion:
    """A row without what ``generate`` put behind its end."""
    completion, own = Completion(), watch(settings.stop, tokenizer)
    for token, *both in zip(ids, logprobs, sampling_logprobs, strict=True):
        completion.ids.append(token)
        completion.logprobs.append(both[0])
        completion.sampling_logprobs.append(both[1])
        if token in ends:
            completion.finish = "end"
            break
        if own is not None and own.push(token):
            completion.finish = "stop"
            break
    return completion
