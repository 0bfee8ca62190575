"""`strop methods` says what settings and objectives say; every method has a page, a configuration and a formula."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from strop import method_catalogue
from strop.cli import main
from strop.config import METHODS
from strop.config.manual import FOR_DATA
from strop.config.methods import LossType

ROOT = Path(__file__).resolve().parents[2]


def test_the_listing_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_an_explanation_has_every_setting_and_every_metric(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", method]) == 0
    out = capsys.readouterr().out
    objective = method_catalogue.objective_class(METHODS[method])
    for name in METHODS[method].model_fields.keys() - {"method"}:
        assert f"\n  {name}  (" in out
    for name in objective.METRICS:
        assert f"\n  {name}\n" in out
    assert "loss" in out and method_catalogue.ROWS[METHODS[method].ROWS].split(":")[0] in out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_page_and_a_config(method: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)", page, flags=re.MULTILINE)
    assert titles == ["When to use it", "Formula", "Settings", "Data", "Metrics", "A healthy run"]
    assert f"configs/{method}.yaml" in page
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / "methods" / link).is_file(), link


def test_every_loss_of_dpo_has_its_formula() -> None:
    formula = method_catalogue.markdown("dpo").split("```")[1]
    for name in get_args(LossType):
        assert re.search(rf"^    {name} ", formula, flags=re.MULTILINE), name


@pytest.mark.parametrize("arguments", [["dpoo"], ["DPO"], ["dpo", "kto"], ["--all"]])
def test_other_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", *arguments]) == 1
    said = capsys.readouterr().err
    assert ("there is no method" if len(arguments) == 1 else "2 names are given") in said
    assert ("did you mean strop methods dpo?" in said) == (
        arguments[0].lower().startswith("dpo") and len(arguments) == 1
    )


def test_the_table_of_data_has_every_method_and_stands_in_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    assert {method for _, method, _ in FOR_DATA} == set(METHODS)
    for data, method, note in FOR_DATA:
        assert f"| {data} | [{method}](methods/{method}.md) | {note} |\n" in guide
        assert re.search(rf"^  {re.escape(data)} +{method} *{re.escape(note)}$", shown, flags=re.MULTILINE)
        kind = (
            "group"
            if "rewards" in data
            else "labelled"
            if "marked" in data
            else "pair"
            if "pairs" in data
            else "single"
        )
        assert kind == METHODS[method].ROWS
