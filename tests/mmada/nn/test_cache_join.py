"""Rows of several caches in one: every mixture goes on from each as if nothing had happened."""

import pytest
import torch
from torch.testing import assert_close

from mmada.nn.cache import MMaDACache
from mmada.nn.cache_join import fewest_moves
from tests.mmada.mixtures import every_mixture, make_mixture, random_ids

CLOSE = {"rtol": 0, "atol": 1e-11}  # of logits of about 1 to 10, in float64


class Told:
    """A cache, the ids that each of its rows was fed, and the logits behind them, row by row."""

    def __init__(self, model, ids, cache=None, logits=None):
        self.model, self.ids = model, ids
        self.cache, self.logits = cache, logits or [[] for _ in ids]
        if cache is None:
            self.cache = MMaDACache(model.config.num_hidden_layers)
            longest = max(map(len, ids))
            padded = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in ids])
            mask = torch.arange(longest) < torch.tensor([len(row) for row in ids])[:, None]
            self._feed(padded, mask)

    def go_on(self, steps, seed):
        for step in range(steps):
            new = random_ids(len(self.ids), 1, seed=seed + step)
            self.ids = [torch.cat([row, token]) for row, token in zip(self.ids, new, strict=True)]
            self._feed(new, torch.ones_like(new))
        return self

    def _feed(self, new, mask):
        logits = self.model(new, attention_mask=mask, past_key_values=self.cache).logits
        self.logits = [[*old, row[: int(own.sum())]] for old, row, own in zip(self.logits, logits, mask, strict=True)]

    def check(self):
        for ids, logits in zip(self.ids, self.logits, strict=True):
            assert_close(torch.cat(logits), self.model(ids[None], use_cache=False).logits[0], **CLOSE)


def joined(*sources, spare_columns=0):
    (first, _), *_ = sources
    return Told(
        first.model,
        [told.ids[row] for told, rows in sources for row in rows],
        MMaDACache.joined([(told.cache, torch.tensor(rows)) for told, rows in sources], spare_columns),
        [told.logits[row] for told, rows in sources for row in rows],
    )


def refilled(told, kept, new, rows):
    cache, order = told.cache.refilled(kept, [(new.cache, torch.tensor(rows, dtype=torch.long))], spare_columns=8)
    ids = [told.ids[row] for row in kept] + [new.ids[row] for row in rows]
    logits = [told.logits[row] for row in kept] + [new.logits[row] for row in rows]
    return Told(told.model, [ids[number] for number in order], cache, [logits[number] for number in order])


def prompts(*lengths, seed=3):
    return [random_ids(1, length, seed=seed + length)[0] for length in lengths]


@every_mixture
@torch.no_grad()
def test_rows_of_several_caches_go_on_together(name):
    """Joined and dropped several times, ragged, doubled, and with the sources going on by themselves."""
    model = make_mixture(name)
    first = Told(model, prompts(7, 3, 11)).go_on(2, seed=10)
    second = Told(model, prompts(5, 1, seed=4)).go_on(1, seed=20)
    both = joined((first, [2, 0]), (second, [1, 0])).go_on(3, seed=30)
    both.check()
    assert both.cache.lengths_B.tolist() == [16, 12, 5, 9]
    alone = Told(model, prompts(14))
    doubled = joined((both, [3, 2, 2]), (alone, [0])).go_on(4, seed=40)
    doubled.check()
    single = joined((doubled, [1])).go_on(2, seed=50)
    single.check()
    assert single.cache.lengths_B is None and single.cache.columns == 5 + 4 + 2  # what no row needs is gone
    three = joined((single, [0, 0]), (alone, [0])).go_on(2, seed=60)
    three.check()
    for told in (first, second, alone, both):  # are as they were
        told.go_on(2, seed=70).check()


@every_mixture
@torch.no_grad()
def test_rows_are_replaced_where_they_are(name):
    """Gaps are filled by new rows and by those from the end; more rows than before, and fewer."""
    model = make_mixture(name)
    told = joined((Told(model, prompts(7, 3, 11, 5)), [0, 1, 2, 3]), spare_columns=8).go_on(2, seed=10)
    new = Told(model, prompts(6, 2, seed=8))
    for kept, rows in (([0, 3], [1]), ([1, 2], [0, 1, 1]), ([1, 4], []), ([0, 1], [0])):
        told = refilled(told, kept, new, rows).go_on(2, seed=20 + len(rows))
        told.check()
    new.go_on(1, seed=90).check()


def test_a_row_that_can_stay_stays():
    assert fewest_moves([0, 2, 3], 1) == ([0, 3, 1, 2], [])
    assert fewest_moves([1, 4, 5], 0) == ([1, 0, 2], [(4, 0), (5, 2)])
    assert fewest_moves([1], 3) == ([1, 0, 2, 3], [])


@torch.no_grad()
def test_what_there_is_room_for_is_not_copied():
    model = make_mixture("attention")
    told = joined((Told(model, prompts(9, 3, 5, 7)), [0, 1, 2, 3]), spare_columns=8).go_on(1, seed=10)

    def place():
        return told.cache.layers[0].key_values().keys.untyped_storage().data_ptr()

    before = place()
    for kept, rows in (([0, 1, 3], [0]), ([1, 2], [])):
        told = refilled(told, kept, Told(model, prompts(4)), rows)
        assert place() == before
    told = refilled(told, [0, 1], Told(model, prompts(30)), [0])  # neither a third row nor so many columns
    assert place() != before
    told.go_on(2, seed=30).check()


@every_mixture
@torch.no_grad()
def test_a_joined_cache_keeps_no_more_than_its_rows_need(name):
    model = make_mixture(name)
    told = Told(model, prompts(3, 17)).go_on(1, seed=1)
    short = joined((told, [0])).cache
    apart = Told(model, prompts(3)).go_on(1, seed=1).cache
    assert short.num_bytes() <= apart.num_bytes() < told.cache.num_bytes()


@pytest.mark.parametrize(
    "name", ["attention", "window", "multiscale", "alibi-capped", "hybrid-routed", "patches-space"]
)
@pytest.mark.parametrize("spare", [1, 3, 64])
@torch.no_grad()
def test_room_for_columns_to_come_changes_nothing(name, spare):
    """Also where it is used up, where windows move on in it, and where rows are selected and cut in between."""
    model = make_mixture(name)
    told = Told(model, prompts(4, 9, 2))
    logits = []
    for spare_columns in (0, spare):
        cache = MMaDACache.joined([(told.cache, torch.tensor([1, 0, 2, 2]))], spare_columns)
        steps = [model(random_ids(4, 1, seed=step), past_key_values=cache).logits for step in range(7)]
        cache.batch_select_indices(torch.tensor([2, 0, 1]))
        steps += [model(random_ids(3, 2, seed=step), past_key_values=cache).logits for step in range(7, 10)]
        mask = torch.tensor([[1, 1], [1, 0], [0, 0]])  # a pass with padding, which goes the plain way
        steps.append(model(random_ids(3, 2), attention_mask=mask, past_key_values=cache).logits[:2, :1])
        steps += [model(random_ids(3, 1, seed=step), past_key_values=cache).logits for step in range(10, 13)]
        logits.append(torch.cat([step.flatten() for step in steps]))
    assert_close(logits[1], logits[0], **CLOSE)


@torch.no_grad()
def test_what_a_pass_was_handed_is_not_written_over():
    model = make_mixture("attention")
    cache = MMaDACache.joined([(Told(model, prompts(4, 2)).cache, torch.tensor([0, 1]))], spare_columns=8)
    model(random_ids(2, 1), past_key_values=cache)
    kept = cache.layers[0].key_values().keys
    before = kept.clone()
    model(random_ids(2, 1, seed=5), past_key_values=cache)
    assert torch.equal(kept[0], before[0]) and torch.equal(kept[1, :, :3], before[1, :, :3])
    assert cache.layers[0].key_values().keys.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()


def test_what_cannot_be_joined_is_refused():
    model, tokens = make_mixture("hybrid"), random_ids(1, 6)
    rows = torch.tensor([0])
    packed = model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="several documents"):
        MMaDACache.joined([(packed, rows)])
    recording = MMaDACache(2)
    recording.activate_past_recording()
    model(tokens, past_key_values=recording)
    with pytest.raises(ValueError, match="records what may be taken back"):
        MMaDACache.joined([(recording, rows)])
    with pytest.raises(ValueError, match="no row to join"):
        MMaDACache.joined([(packed, rows[:0])])
