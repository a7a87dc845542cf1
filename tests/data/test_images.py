import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbam.data import EpochSampler, Images, loader
from cbam.data.images import draws
from cbam.errors import DataError, InputError


class Numbered(Images):
    """The pixels of sample (epoch, index) are these numbers and the seed."""

    def __init__(self, targets):
        super().__init__("numbered", ["a", "b", "c"], targets, size=2)

    def sample(self, epoch, index):
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        image[0], image[1], image[2] = epoch % 256, index % 256, self.seed % 256
        return image, (0.0, 0.0, 1.0, 2.0)


class Broken(Numbered):
    def sample(self, epoch, index):
        raise DataError("no image: two words")


def gather(batches, key="index"):
    return torch.cat([batch[key] for batch in batches])


def test_a_sample_is_a_dict_of_image_target_index_and_box():
    sample = Numbered([0, 2, 1])[(5, 1)]
    assert sample["image"][:, 0, 0].tolist() == [5, 1, 0]
    assert (sample["target"], sample["index"]) == (2, 1)
    assert sample["box"].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("key", [3, -1, (0, 3), (-1, 0)])
def test_an_index_out_of_range_is_an_index_error(key):
    with pytest.raises(IndexError, match="numbered has 3 samples"):
        Numbered([0, 2, 1])[key]


def test_a_set_can_be_iterated():
    assert [s["target"] for s in Numbered([0, 2, 1])] == [0, 2, 1]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    size=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_every_sample_comes_once_except_a_single_last_one(n, size, seed, epoch):  # D33
    batches = loader(Numbered([0] * n), size, train=True, seed=seed)
    batches.sampler.set_epoch(epoch)
    seen = list(batches)
    assert len(seen) == len(batches)
    left_out = 1 if size > 1 and n > size and n % size == 1 else 0
    indices = gather(seen).tolist()
    assert len(indices) == len(set(indices)) == n - left_out
    assert set(indices) <= set(range(n))
    if left_out:
        assert min(len(batch["index"]) for batch in seen) > 1
    assert gather(loader(Numbered([0] * n), size, train=False)).tolist() == list(range(n))


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochSampler(50, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(1, 2)
    torch.manual_seed(1)
    assert order(1, 2) == first
    assert {epoch for epoch, _ in first} == {2}
    assert sorted(i for _, i in first) == list(range(50))
    orders = {tuple(i for _, i in order(seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_epoch_and_the_seed_reach_the_samples():
    batches = loader(Numbered([0] * 6), 3, train=True, seed=9)
    batches.sampler.set_epoch(4)
    image = gather(batches, "image")
    assert (image[:, 0] == 4).all()
    assert (image[:, 2] == 9).all()


def test_evaluation_is_always_epoch_0_in_order():
    images = Numbered([0] * 6)
    batches = loader(images, 4, train=False, seed=9)
    batches.sampler.set_epoch(4)
    image = gather(batches, "image")
    assert image[:, 1, 0, 0].tolist() == list(range(6))
    assert (image[:, 0] == 0).all()
    assert (image[:, 2] == 0).all()
    assert images.seed == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(digits, workers):  # D34
    def epochs(workers):
        batches = loader(digits[0].subset(60), 16, train=True, seed=3, workers=workers)
        for epoch in (0, 1):
            batches.sampler.set_epoch(epoch)
            yield from batches

    for one, other in zip(epochs(0), epochs(workers), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_loader_left_early_starts_over(digits):
    batches = loader(digits[0].subset(60), 16, train=True, workers=2)
    first = next(iter(batches))
    assert torch.equal(next(iter(batches))["image"], first["image"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_raised_unchanged(workers):
    with pytest.raises(DataError) as error:
        list(loader(Broken([0, 1]), 2, train=False, workers=workers))
    assert str(error.value) == "no image: two words"


def test_a_subset_keeps_class_proportions_and_is_spread_over_each_class():
    images = Numbered([0] * 60 + [1] * 30 + [2] * 3)
    part = images.subset(31)
    assert [part.targets.count(label) for label in range(3)] == [20, 10, 1]
    shown = [part[i]["image"][1, 0, 0].item() for i in range(len(part))]
    assert shown[:4] == [0, 3, 6, 9]
    assert [part[i]["index"] for i in range(len(part))] == list(range(31))
    assert part.classes == images.classes
    assert "31 of the 93 samples" in part.notes
    assert images.notes == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.integers(1, 100))
def test_a_subset_has_every_class_and_its_size_up_to_rounding(targets, n):
    part = Numbered(targets).subset(n)
    assert set(part.targets) == set(targets)
    assert len({part[i]["image"][1, 0, 0].item() for i in range(len(part))}) == len(part)
    assert abs(len(part) - min(n, len(targets))) <= 3


def test_a_subset_has_the_samples_of_the_seeded_whole(digits):
    part = digits[0].subset(100)
    whole = digits[0].seeded(5)
    index = part._indices[7]
    assert torch.equal(part.seeded(5)[(2, 7)]["image"], whole[(2, index)]["image"])
    assert not torch.equal(part[(2, 7)]["image"], whole[(2, index)]["image"])
    assert part.has_boxes
    assert part.mean == whole.mean


def test_each_purpose_has_its_own_random_numbers():
    assert draws("order", 1, 2).random() == draws("order", 1, 2).random()
    purposes = ("order", "augmentation", "composition", "fixed composition")
    values = {draws(purpose, a, b).random() for purpose in purposes for a in range(10) for b in range(10)}
    assert len(values) == 400


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size must be an integer from 1"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"workers": -1}, "workers must be an integer from 0"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**32}, "seed must be an integer from 0"),
    ],
)
def test_invalid_settings_are_refused(options, told):
    with pytest.raises(InputError, match=told):
        loader(Numbered([0, 1]), **{"batch_size": 2, "train": True, **options})


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="numbered has no samples"):
        loader(Numbered([]), 2, train=False)
