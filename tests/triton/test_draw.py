"""The data of the cells of the Triton kernels."""

import torch


def test_decided_data_has_no_value_near_the_kink_of_the_relu(tails):
    cell = tails.Cell(shape=(2, 32, 14, 14), dtype=torch.bfloat16)
    plain, decided = (tails.draw(cell.but(data=data), "cpu") for data in ("random", "decided"))
    near = tails.undecided(plain)
    assert near.any()
    assert not tails.undecided(decided).any()
    assert torch.equal(plain.shortcut != decided.shortcut, near)
