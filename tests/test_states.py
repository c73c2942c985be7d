"""States are what a tensor of the same numbers is, part by part, and no copy of it."""

import pytest
import torch

from cascadeexit.backends.cpu.states import States, joined, like, tensor_of


def filled(*shape: int) -> States:
    states = States(shape)
    states.tensor().copy_(torch.randn(shape))
    return states


@pytest.mark.parametrize("at", [0, 3, -1, slice(2), slice(1, 4), slice(-2, None), slice(0, 9), slice(5, 5)], ids=str)
def test_a_part_is_that_of_the_tensor(at):
    states = filled(1, 5, 6)
    part = states[:, at]
    assert torch.equal(part.tensor(), states.tensor()[:, at]) and part.shape == part.tensor().shape
    states.tensor().neg_()
    assert torch.equal(part.tensor(), states.tensor()[:, at]), "a copy"
    if part.tensor().numel():
        assert part.data_ptr() == states.tensor()[:, at].data_ptr()


def test_a_part_of_a_part_and_one_that_outlives_the_whole():
    whole = filled(3, 4)
    expected = whole.tensor().clone()
    part = whole.part(1, (1, 2, 4))[:, -1]
    del whole
    assert torch.equal(part.tensor(), expected[2:])


def test_joined_rows_follow_each_other():
    parts = [filled(1, n, 6) for n in (2, 1, 3)]
    whole = joined(parts)
    assert torch.equal(tensor_of(whole), torch.cat([part.tensor() for part in parts], dim=1))


@pytest.mark.parametrize("rows", [filled(1, 2, 6), filled(1, 2, 6).tensor()], ids=["states", "tensor"])
def test_room_for_like_rows_is_of_their_kind(rows):
    assert type(like(rows)) is type(rows) and like(rows).shape == rows.shape


def test_a_row_past_the_end_is_refused():
    with pytest.raises(IndexError):
        filled(1, 2, 4)[:, 2]
