"""Text from a model: many completions at once for training, and one as it is typed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

import mmada.model  # noqa: F401  (registers the family with the Auto classes)
from mmada.generation.reference import generate_reference
from mmada.generation.rollouts import generate_batch, score_cached
from mmada.generation.settings import Completion, SamplingSettings
from mmada.tokenizer import IncrementalDecoder

__all__ = ["Completion", "SamplingSettings", "generate_batch", "generate_reference", "score_cached", "stream_text"]


class _TokenQueue(BaseStreamer):
    """New ids as ``generate`` makes them, without the prompt; None at the end."""

    def __init__(self) -> None:
        self.ids: Queue[list[int] | None] = Queue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt:
            self.ids.put(value.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        self.ids.put(None)


def stream_text(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` piece by piece, from a folder that ``save_pretrained`` wrote.

    ``temperature`` 0 is greedy. The same seed gives the same text on the same machine.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer, decoder = _TokenQueue(), IncrementalDecoder(tokenizer)
    sampling = (
        # top_k: left out, transformers takes the 50 likeliest alone
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    failure: list[BaseException] = []

    def decode() -> None:
        try:
            model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            failure.append(error)
            streamer.end()

    worker = Thread(target=decode, daemon=True)
    worker.start()
    while (ids := streamer.ids.get()) is not None:
        yield decoder.push(ids)
    yield decoder.finish()
    worker.join()
    if failure:
        raise failure[0]
