"""Splits are functions of (labels, seed, limits): sizes, shares, and the small cases."""

import numpy as np
import pytest

from core.config import Config
from core.errors import UsageError
from data import splits

NAMES = ("train", "validation", "test")
LABELS = np.repeat(np.arange(4), [40, 30, 20, 10])  # 100 images


def sample(labels, count, seed=0, **options):
    return splits.stratified_sample(np.asarray(labels), count, np.random.default_rng(seed), **options)


def assign(labels, **settings):
    labels = {split: np.asarray(values, np.int64) for split, values in labels.items()}
    return splits.assign(labels, NAMES, Config(**settings))


def sizes(parts):
    return {role: part and len(part[1]) for role, part in parts.items()}


def test_sample_is_proportional():
    drawn = sample(LABELS, 10)
    assert np.bincount(LABELS[drawn]).tolist() == [4, 3, 2, 1]
    assert (np.diff(drawn) > 0).all()


def test_sample_gives_each_class_one_if_possible():
    labels = [0] * 97 + [1, 2, 3]
    assert np.bincount(np.array(labels)[sample(labels, 4)]).tolist() == [1, 1, 1, 1]


def test_small_sample_draws_classes_by_seed():
    labels = np.repeat(np.arange(20), 3)
    picks = {tuple(labels[sample(labels, 5, seed)]) for seed in range(5)}
    assert all(len(set(pick)) == 5 for pick in picks)
    assert len(picks) > 1


def test_sample_of_more_than_all_is_all():
    assert sample(LABELS, 1000).tolist() == list(range(100))


def test_sample_spares_the_last_of_a_class():
    labels = [0] * 10 + [1]
    assert 10 not in sample(labels, 10, spare_one=True)
    assert len(sample(labels, 10, spare_one=True)) == 9


def test_sample_differs_by_seed_and_repeats_by_seed():
    assert sample(LABELS, 10, seed=1).tolist() == sample(LABELS, 10, seed=1).tolist()
    assert sample(LABELS, 10, seed=1).tolist() != sample(LABELS, 10, seed=2).tolist()


def test_hold_out_is_a_stratified_tenth_disjoint_from_train():
    parts = assign({"train": LABELS, "test": LABELS})
    (split, train), (from_split, held) = parts["train"], parts["validation"]
    assert (split, from_split) == ("train", "train")
    assert np.bincount(LABELS[held]).tolist() == [4, 3, 2, 1]
    assert sorted([*train, *held]) == list(range(100))


def test_own_validation_split_leaves_train_unchanged():
    parts = assign({"train": LABELS, "validation": LABELS[:7], "test": LABELS[:5]})
    assert sizes(parts) == {"train": 100, "validation": 7, "test": 5}
    assert parts["validation"][0] == "validation"


def test_paper_protocol_holds_nothing_out():
    both = {"train": LABELS, "test": LABELS[:5]}
    assert sizes(assign(both, protocol="paper")) == {"train": 100, "validation": None, "test": 5}
    own = both | {"validation": LABELS[:7]}
    assert sizes(assign(own, protocol="paper")) == {"train": 100, "validation": None, "test": 5}


def test_validation_split_replaces_missing_test_split():
    parts = assign({"train": LABELS, "validation": LABELS[:7]})
    assert sizes(parts) == {"train": 90, "validation": 10, "test": 7}
    assert parts["test"][0] == "validation"


def test_a_fifth_of_train_replaces_missing_test_split():
    parts = assign({"train": LABELS})
    assert sizes(parts) == {"train": 72, "validation": 8, "test": 20}
    everyone = np.concatenate([positions for _, positions in parts.values()])
    assert sorted(everyone) == list(range(100))


def test_unlabelled_test_split_counts_as_absent():
    parts = assign({"train": LABELS, "test": [-1, -1]})
    assert parts["test"][0] == "train"


def test_limits_apply_before_the_hold_out():
    parts = assign({"train": LABELS, "test": LABELS}, limit_train=20, limit_test=7)
    assert sizes(parts) == {"train": 18, "validation": 2, "test": 7}
    parts = assign({"train": LABELS, "test": LABELS}, limit_train=1000, limit_test=1000)
    assert sizes(parts) == {"train": 90, "validation": 10, "test": 100}


def test_one_limit_does_not_change_the_other_draw():
    both = {"train": LABELS, "test": LABELS}
    alone = assign(both, limit_test=7)["test"][1]
    together = assign(both, limit_test=7, limit_train=20)["test"][1]
    assert alone.tolist() == together.tolist()


def test_classes_of_one_image_stay_in_train():
    labels = np.array([0] * 20 + [1])
    assert 20 in assign({"train": labels, "test": labels})["train"][1]


def test_hold_out_has_at_least_one_image():
    assert sizes(assign({"train": [0, 1, 2], "test": [0]})) == {"train": 2, "validation": 1, "test": 1}


def test_one_training_image_cannot_be_split():
    with pytest.raises(UsageError, match="at least 2 training images. Received: 1"):
        assign({"train": LABELS, "test": LABELS}, limit_train=1)


def test_no_train_split_is_an_error():
    with pytest.raises(UsageError, match="'train'. Received: digits with test"):
        assign({"test": LABELS})
