"""What byte patches keep: rows whose entries come, go and change places independently."""

import torch

from mmada.nn.patches.state import Trail


def rows_of(trail):
    """Each row's entries, oldest first."""
    kept = trail.entries["x"].tolist()
    return [row[len(row) - count :] for row, count in zip(kept, trail.counts_B.tolist(), strict=True)]


def test_rows_grow_shrink_and_move_independently():
    trail = Trail()
    assert trail.last("x", 3) is None
    trail.append({"x": torch.tensor([[1, 2, 3], [11, 0, 0]])}, torch.tensor([3, 1]))
    assert rows_of(trail) == [[1, 2, 3], [11]]
    trail.append({"x": torch.tensor([[4, 0], [12, 13]])}, torch.tensor([1, 2]))
    trail.append({"x": torch.tensor([[5], [14]])}, None)
    assert rows_of(trail) == [[1, 2, 3, 4, 5], [11, 12, 13, 14]]
    trail.drop(torch.tensor([0, 3]))
    assert rows_of(trail) == [[1, 2, 3, 4, 5], [11]]
    trail.map(lambda tensor: tensor[torch.tensor([1, 0, 0])])
    trail.append({"x": torch.tensor([[15, 16], [6, 0], [0, 0]])}, torch.tensor([2, 1, 0]))
    assert rows_of(trail) == [[11, 15, 16], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]]
    trail.trim(4)
    assert rows_of(trail) == [[11, 15, 16], [3, 4, 5, 6], [2, 3, 4, 5]]
    assert trail.last("x", 2).tolist() == [[15, 16], [5, 6], [4, 5]]
    assert trail.last("x", 9).shape == (3, 9)
