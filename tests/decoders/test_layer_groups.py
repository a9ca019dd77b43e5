"""Layers are grouped so that one pool of blocks serves all of them with little waste."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_serve.decoders.layer_groups import LayerGroup, group_layers


def pattern(kinds: str) -> list[int | None]:
    """`s` slides over 8 positions, `S` over 64, `f` sees all."""
    return [{"s": 8, "S": 64, "f": None}[kind] for kind in kinds]


def test_layers_of_one_kind_are_one_group():
    assert group_layers(pattern("ffff")) == (LayerGroup(None, (0, 1, 2, 3)),)
    assert group_layers(pattern("sss")) == (LayerGroup(8, (0, 1, 2)),)


def test_five_sliding_layers_to_one_full_are_six_groups_of_one_size():
    groups = group_layers(pattern("sssssf" * 5))
    assert [group.window for group in groups] == [None] + [8] * 5
    assert groups[0].layers == (5, 11, 17, 23, 29)
    assert {len(group.layers) for group in groups} == {5}


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [
        ("sf" * 13, [13, 13]),
        ("sssssf" * 10 + "ss", [10] + [10] * 5 + [2]),
        ("f" * 27 + "s", [9, 9, 9, 1]),
        ("sSf", [1, 1, 1]),
    ],
    ids=["in turns", "not a whole pattern", "one that slides", "two windows"],
)
def test_no_place_for_a_full_layer_is_wasted(kinds, sizes):
    assert [len(group.layers) for group in group_layers(pattern(kinds))] == sizes


@given(st.lists(st.sampled_from([None, 4, 8]), min_size=1, max_size=70))
def test_every_layer_has_one_place_and_groups_are_few(windows):
    groups = group_layers(windows)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(windows[layer] == group.window for group in groups for layer in group.layers)
    assert len(groups) <= 8
