"""Windows add sums and counts; the probe sees what moved."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from strop.engine.metrics import MetricWindow, UpdateProbe
from worlds import replicated


def test_a_window_divides_once_and_starts_again() -> None:
    window = MetricWindow()
    window.add_means({"a": (1.0, 1), "b": (6.0, 3)})
    window.add_means({"a": (2.0, 1), "b": (0.0, 1)})
    window.add_totals(num_groups=4)
    window.add_totals(num_groups=3)
    assert window.flush() == {"a": 1.5, "b": 1.5, "num_groups": 7}
    assert window.flush() == {}


def test_a_window_survives_json_exactly() -> None:
    window, other = MetricWindow(), MetricWindow()
    window.add_means({"a": (0.1, 3)})
    window.add_totals(n=2)
    other.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert other.flush() == window.flush()


def test_the_probe_measures_the_update() -> None:
    layer = nn.Linear(4, 4)
    probe = UpdateProbe(replicated(dict(layer.named_parameters())))
    assert probe.measure() == {"update_ratio": (0.0, 1), "changed_fraction": (0.0, 1)}
    size = torch.cat([p.detach().flatten() for p in layer.parameters()]).norm()
    with torch.no_grad():
        layer.weight[0] += 0.5
    moved = probe.measure()
    assert moved["update_ratio"][0] == pytest.approx(float(1.0 / size), rel=1e-5)
    assert moved["changed_fraction"][0] == pytest.approx(4 / 20)
