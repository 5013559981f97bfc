"""Budgets, ranks, ties, the rule for the head, and the layers that --layers and --exclude_layers match."""

import json

import numpy as np
import pytest
from networks import network_of, tiny_model

from core.config import Config
from core.errors import UsageError
from selection import SCHEMES, baselines
from selection.ranking import kendall_stability, layer_budget, rank, select_top

PATHS = ["stem", "branch", "branch_bn", "deep", "deep_bn", "head"]


@pytest.fixture(scope="module")
def network():
    return network_of(tiny_model())


@pytest.mark.parametrize(
    "rho, num_layers, budget",
    [(0.1, 107, 10), (0.1, 105, 10), (0.1, 14, 1), (0.1, 99, 9), (0.1, 9, 1), (1e-9, 50, 1), (1.0, 50, 50),
     (0.29, 100, 29), (0.57, 100, 57), (0.5, 3, 1)],
)  # fmt: skip
def test_budget_is_the_floor_and_at_least_one(rho, num_layers, budget):
    assert layer_budget(rho, num_layers) == budget


def test_ties_go_to_the_layer_nearer_the_output():
    assert rank([0.5, 1.0, 1.0, 0.0], [True] * 4) == [3, 2, 1, 4]
    assert rank([0.5, 1.0, 1.0, 0.0], [True, True, False, True]) == [2, 1, None, 3]


def test_head_is_added_to_the_budget(network):
    chosen = select_top(network, Config(rho=0.34), [6, 5, 4, 3, 2, 1])
    assert chosen.max_layers == 2
    assert chosen.selected == ("stem", "branch")
    assert chosen.head_added
    assert chosen.trained_weights == (
        "stem/kernel", "stem/bias", "branch/kernel", "branch/bias", "head/kernel", "head/bias",
    )  # fmt: skip
    assert [row["selected"] for row in chosen.layers] == [True, True, False, False, False, False]


def test_selected_head_counts_in_the_budget(network):
    chosen = select_top(network, Config(rho=0.34), [0, 0, 0, 0, 1, 2])
    assert chosen.selected == ("deep_bn", "head")
    assert not chosen.head_added
    assert chosen.trained_weights == ("deep_bn/gamma", "deep_bn/beta", "head/kernel", "head/bias")


def test_excluded_layers_have_no_rank(network):
    chosen = select_top(network, Config(rho=0.34, exclude_layers="bn|stem"), [6, 5, 4, 3, 2, 1])
    assert chosen.selected == ("branch", "deep")
    assert [row["rank"] for row in chosen.layers] == [None, 1, None, 2, None, 3]


@pytest.mark.parametrize(
    "pattern, rule", [("nothing", "which matches none of 6"), ("", "all 6"), ("(", "regular expression")]
)
def test_exclude_layers_must_match_some_and_leave_some(network, pattern, rule):
    with pytest.raises(UsageError, match=rule):
        SCHEMES["betti_train"].check(network, Config(exclude_layers=pattern), 100)


def test_fewer_than_four_points_are_refused(network):
    for batch_size, images in [(3, 100), (32, 3)]:
        with pytest.raises(UsageError, match="at least 4 images"):
            SCHEMES["betti_train"].check(network, Config(batch_size=batch_size), images)
    SCHEMES["betti_train"].check(network, Config(batch_size=4), 100)
    SCHEMES["betti_train"].check(network, Config(batch_size=3, betti_points=16), 100)


def test_too_expensive_clouds_are_refused(network):
    SCHEMES["betti_train"].check(network, Config(betti_points=512), 10_000)
    with pytest.raises(UsageError, match="6000 points, predicted at 3110 s and 2304 MB"):
        SCHEMES["betti_train"].check(network, Config(betti_points=6000), 10_000)


def test_stability_is_kendalls_tau_of_batches():
    up, down = np.arange(6.0), -np.arange(6.0)
    assert kendall_stability(np.stack([up, up, up])) == pytest.approx(1)
    assert kendall_stability(np.stack([up, down])) == pytest.approx(-1)
    assert kendall_stability(np.stack([up])) is None
    assert kendall_stability(np.zeros((2, 6))) is None


def test_schemes_without_ranking_select_their_layers(network):
    def select(name, **flags):
        return SCHEMES[name].select(network, None, Config(train_type=name, **flags))

    assert select("full_training").selected == tuple(PATHS)
    assert len(select("full_training").trained_weights) == 12
    assert select("traditional_tl_training").selected == ("head",)
    assert not select("traditional_tl_training").head_added
    assert select("listed_layers", layers="^branch").selected == ("branch", "branch_bn")
    assert select("listed_layers", layers="^branch").head_added


def test_layers_are_read_from_list_or_selection(network, tmp_path):
    paths, selection = tmp_path / "paths.txt", tmp_path / "selection.json"
    paths.write_text("deep\n\nstem\n")
    selection.write_text(json.dumps({"selected": ["deep", "stem"]}))
    for file in (paths, selection):
        chosen = baselines.listed(network, None, Config(layers=f"@{file}"))
        assert chosen.selected == ("stem", "deep")


@pytest.mark.parametrize(
    "content, rule",
    [("deep\nwhat\n", "1 others \\('what'\\)"), ("deep_bm\n", "'deep_bm', near deep_bn and deep"), ("", "empty list"), ('{"a": 1}', "KeyError"), ('{"selected": 3}', "list of layer")],
)  # fmt: skip
def test_invalid_layer_list_is_refused(network, tmp_path, content, rule):
    file = tmp_path / "list"
    file.write_text(content)
    with pytest.raises(UsageError, match=rule):
        baselines.check_listed(network, Config(layers=f"@{file}"), 100)
