"""One layer at a time, as the model would call it."""

import torch

from mmada.nn.context import Context
from mmada.nn.positions import rotary_cos_sin


def make_context(config, batch, length, dtype=torch.float64, *, cache=None, lengths=None, documents=None):
    """The context of ``length`` new tokens in each of ``batch`` rows, after what ``cache`` holds.

    ``lengths``: real tokens per row, where rows differ; ``documents`` (B, T): their documents.
    """
    past_B = None if cache is None else cache.lengths_B
    past = 0 if cache is None else cache.columns if past_B is None else int(past_B.max())
    start = past if past_B is None else past_B[:, None]
    position_ids = (start + torch.arange(length)[None]).expand(batch, length)
    if documents is not None:
        first = torch.stack([torch.searchsorted(row.contiguous(), row.contiguous()) for row in documents])
        position_ids = position_ids - first
    return Context(
        shape=(batch, length),
        device=torch.device("cpu"),
        position_ids_BT=position_ids,
        lengths_B=None if lengths is None else torch.as_tensor(lengths),
        past=past,
        past_B=past_B,
        documents_BT=documents,
        rotary=rotary_cos_sin(config, position_ids, dtype) if config.position_embedding_type == "rope" else None,
    )


def run_mixer(mixer, hidden, *, cache=None, lengths=None, documents=None):
    """The mixer's output (B, T, D) on new tokens; a cache is moved on as the model would."""
    context = make_context(
        mixer.config, *hidden.shape[:2], hidden.dtype, cache=cache, lengths=lengths, documents=documents
    )
    output, _ = mixer(hidden, context, cache)
    if cache is not None:
        cache.advance(hidden.shape[1], context.valid_BT())
    return output
