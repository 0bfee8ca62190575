"""The same rows are the same examples in every format: what Arrow, CSV and JSON text add or lose is made good."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strop.data.read.arrow import NOT_READ, RowMaker
from strop.data.read.files import read_parquet
from strop.data.read.sources import choose_sources
from strop.data.shapes.examples import RowColumns, to_example
from strop.data.store.row_pipeline import RowPipeline
from strop.types import Example, Origin, RowShape

Row = dict[str, Any]
Make = Callable[..., Any]

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: bool(text.strip()) and "\r" not in text  # csv turns a lone CR into LF
)
values = st.one_of(st.integers(-9, 9), words, st.booleans())
names = st.sampled_from(["a", "b", "c"])


@st.composite
def tool_rows(draw: st.DrawFn) -> list[Row]:
    """Conversations whose calls and tools have other keys in each row, of one type for each key."""
    kinds = {"a": st.integers(-9, 9), "b": words, "c": st.booleans()}
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        keys = draw(st.lists(names, unique=True, min_size=1))
        arguments = {key: draw(kinds[key]) for key in keys}
        call = {"type": "function", "function": {"name": draw(words), "arguments": arguments}}
        schema = {key: {"type": draw(words), **draw(st.dictionaries(names, words, max_size=2))} for key in keys}
        turns: list[Row] = [{"role": "user", "content": draw(words)}]
        if draw(st.booleans()):
            turns += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
        turns += [{"role": "assistant", "content": draw(words), **draw(st.sampled_from([{}, {"weight": 1}]))}]
        row: Row = {"messages": turns, "system": draw(words)}
        if draw(st.booleans()):
            tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": schema}}}
            row["tools"] = [tool]
        rows.append(row)
    return rows


@st.composite
def pair_rows(draw: st.DrawFn) -> list[Row]:
    turns = st.lists(words, min_size=2, max_size=2, unique=True)

    def one() -> Row:
        chosen, rejected = draw(turns)
        prompt = [{"role": "user", "content": draw(words)}]
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }

    return [one() for _ in range(draw(st.integers(1, 4)))]


def as_jsonl(rows: Sequence[Row], folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_parquet(rows: Sequence[Row], folder: Path) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(_filled(rows)), path)
    return str(path)


def as_saved(rows: Sequence[Row], folder: Path) -> str:
    path = folder / "saved"
    datasets.Dataset.from_list(_filled(rows)).save_to_disk(path)
    return str(path)


def as_csv(rows: Sequence[Row], folder: Path) -> str:
    path = folder / "rows.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            cells = (row.get(key, "") for key in columns)
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return str(path)


def _filled(rows: Sequence[Row]) -> list[Row]:
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


FORMATS = {"parquet": as_parquet, "saved": as_saved, "csv": as_csv}


def examples(name: str, shape: RowShape, make_config: Make) -> list[Example]:
    source = choose_sources(make_config(name=name).dataset, shape).train[0]
    found = []
    for row in source.read():
        assert row.data is not None
        found.append(to_example(row.data, Origin("", 0), shape, RowColumns()))
    return found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("shape", "make"), [("single", tool_rows), ("pair", pair_rows)])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_same_rows_are_the_same_examples_in_every_format(
    kind: str, shape: RowShape, make: Callable[[], Any], data: st.DataObject, tmp_path: Path, make_config: Make
) -> None:
    rows = data.draw(make())
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    expected = examples(as_jsonl(rows, folder), shape, make_config)
    found = examples(FORMATS[kind](rows, folder), shape, make_config)
    bare = [Example(e.prompt, e.completions, e.origin, e.tools, e.label) for e in found]  # but for the notes
    assert bare == expected


KEYS = {
    "a": st.integers(-9, 9),
    "b": words,
    "c": st.booleans(),
    "d": st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=3),
    "e": st.fixed_dictionaries({"x": words}, optional={"y": st.integers(-9, 9)}),
    "f": st.lists(st.fixed_dictionaries({"x": words}, optional={"y": st.lists(words, max_size=2)}), max_size=2),
}
"""Arguments of calls and parts of schemas, of one type for each key, as tables need it."""

WHOLE = {"a": 1, "b": "x", "c": True, "d": [1, None], "e": {"x": "x", "y": 1}, "f": [{"x": "x", "y": ["x"]}]}
"""All keys: a table has them in the order of their first row, so that only rows in this order are the same in it."""

nested = st.fixed_dictionaries({}, optional=KEYS).map(lambda made: json.loads(json.dumps(made, sort_keys=True)))


def asking(arguments: Row) -> Row:
    """A turn that calls a function."""
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


@st.composite
def nested_rows(draw: st.DrawFn) -> list[Row]:
    """Conversations with nested calls and tools, in which each row has other keys than the others."""

    def turns() -> list[Row]:
        made: list[Row] = [{"role": "user", "content": draw(words)}]
        for _ in range(draw(st.integers(0, 2))):
            beside = draw(st.sampled_from([{}, {"content": ""}, {"content": "x"}]))
            made += [{**asking(draw(nested)), **beside}, {"role": "tool", "content": draw(st.sampled_from(["", "x"]))}]
        more = draw(st.sampled_from([{}, {"weight": 1}, {"lang": "en"}]))
        return [*made, {"role": "assistant", "content": draw(words), **more}]

    def tools(properties: Row) -> list[Row]:
        parameters = {"type": "object", "properties": properties}
        return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]

    first = {"messages": [{"role": "user", "content": "q"}, asking(WHOLE)], "tools": tools(WHOLE)}
    rows: list[Row] = [first, *({"messages": turns()} for _ in range(draw(st.integers(1, 3))))]
    for row in rows[1:]:
        if draw(st.booleans()):
            row["tools"] = tools(draw(nested))
        if draw(st.booleans()):
            row["chat_template_kwargs"] = draw(st.sampled_from([{"deep": True}, {"mood": "glad"}]))
    return rows


TOOLED = (
    "{{ mood or '' }}{% if deep %}deep{% endif %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c | tojson) }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tokens(name: str, shape: RowShape, make_config: Make, tokenizer: Any) -> list[dict[str, Any]]:
    """What becomes of the rows: ids, masks, and what was done to them, but for how the format holds them."""
    config = make_config({"max_seq_length": 10**6, "max_prompt_length": None}, name=name, on_error="skip")
    rows = choose_sources(config.dataset, shape).train[0].read()
    done = RowPipeline(config, tokenizer, shape).work(list(rows))
    found = done.table.to_pylist() if done.table is not None else []
    kept = [{**record, "messages_as_json": 0, "line": 0, "prompt_hash": 0} for record in found]
    return [*kept, {"refused": dict(done.refused), "dropped": dict(done.dropped)}]


@pytest.mark.share(3)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("shape", "make"), [("single", nested_rows), ("pair", pair_rows)])
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_same_rows_are_the_same_tokens_in_every_format(
    kind: str,
    shape: RowShape,
    make: Callable[[], Any],
    data: st.DataObject,
    tmp_path: Path,
    make_config: Make,
    make_tokenizer: Make,
) -> None:
    tokenizer, rows = make_tokenizer(template=TOOLED), data.draw(make())
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    expected = tokens(as_jsonl(rows, folder), shape, make_config, tokenizer)
    assert tokens(FORMATS[kind](rows, folder), shape, make_config, tokenizer) == expected


@pytest.mark.nightly
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nulls_that_json_wrote_are_the_same_tokens_as_json_text(
    data: st.DataObject, tmp_path: Path, make_config: Make, make_tokenizer: Make
) -> None:
    """A CSV file and a column of JSON text hold them as JSON Lines do."""
    leaves = st.one_of(st.none(), st.integers(-9, 9), words, st.booleans())
    anything = st.recursive(leaves, lambda kind: st.lists(kind, max_size=2) | st.dictionaries(names, kind, max_size=2))
    arguments = st.dictionaries(names, anything, min_size=1, max_size=3)
    call = {"type": "function", "function": {"name": "f", "arguments": data.draw(arguments)}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": data.draw(arguments)}}}
    turns = [
        {"role": "user", "content": data.draw(words)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    rows = [{"messages": turns, "tools": [tool]}]
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    tokenizer = make_tokenizer(template=TOOLED)
    expected = tokens(as_jsonl(rows, folder), "single", make_config, tokenizer)
    as_text = [{key: json.dumps(value) for key, value in row.items()} for row in rows]
    for write in (as_csv, as_parquet, as_saved):
        assert tokens(write(as_text, folder), "single", make_config, tokenizer) == expected


def test_maps_are_objects(tmp_path: Path, make_config: Make) -> None:
    """DuckDB writes objects whose keys differ as maps."""
    arguments = pa.map_(pa.string(), pa.string())
    call = pa.struct([("name", pa.string()), ("arguments", arguments)])
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(call))])
    turns = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "f", "arguments": [("city", "Bern"), ("n", None)]}],
        },
        {"role": "assistant", "content": "x"},
    ]
    schema = pa.schema([("messages", pa.list_(turn)), ("picture", pa.map_(pa.string(), pa.binary()))])
    pq.write_table(
        pa.Table.from_pylist([{"messages": turns, "picture": [("a", b"x")]}], schema=schema), tmp_path / "r.parquet"
    )
    (example,) = examples(str(tmp_path / "r.parquet"), "single", make_config)
    assert example.completions[0][0]["tool_calls"] == [{"name": "f", "arguments": {"city": "Bern"}}]
    assert example.notes == ("media_unread",)


def test_a_null_that_json_wrote_stays(tmp_path: Path, make_config: Make) -> None:
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    tool = {"name": "f", "parameters": {"default": None}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    row = {"messages": turns, "tools": [tool]}
    as_text = {**row, "tools": json.dumps([tool])}
    for rows in ([row], [as_text]):
        (found,) = examples(as_jsonl(rows, tmp_path), "single", make_config)
        assert found.tools == (tool,)
        assert found.completions[0][0]["tool_calls"] == [call]  # type: ignore[index]
    (found,) = examples(as_parquet([as_text], tmp_path), "single", make_config)
    assert found.tools == (tool,)


@pytest.mark.parametrize("write", ["parquet", "saved"])
def test_json_columns_of_arrow_are_read(write: str, tmp_path: Path, make_config: Make) -> None:
    """As the package datasets makes them of JSON Lines whose types differ from row to row."""
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": None, "b": 1}}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": "x", "tool_calls": []}]},
    ]  # fmt: skip
    path = as_jsonl(rows, tmp_path)
    data = datasets.Dataset.from_json(path, cache_dir=str(tmp_path / "hf"))
    assert "Json" in str(data.features)
    name = str(tmp_path / ("kept.parquet" if write == "parquet" else "kept"))
    data.to_parquet(name) if write == "parquet" else data.save_to_disk(name)
    assert examples(name, "single", make_config) == examples(path, "single", make_config)


def _media(tmp_path: Path, write: str, value: Any, kind: str) -> str:
    feature = datasets.Audio() if kind == "audio" else datasets.Image()
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "completion": datasets.Value("string"), kind: feature}
    )
    table = pa.table({"prompt": ["q"], "completion": ["x"], kind: pa.array([value], feature.pa_type)})
    data = datasets.Dataset(datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features))
    if write == "saved":
        data.save_to_disk(tmp_path / "rows")
        return str(tmp_path / "rows")
    (tmp_path / "rows").mkdir()
    data.to_parquet(tmp_path / "rows" / "train.parquet")
    return str(tmp_path / "rows" / ("train.parquet" if write == "parquet" else ""))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("write", ["saved", "folder", "parquet"])
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_images_and_sounds_that_nobody_reads_are_not_decoded(
    kind: str, write: str, streaming: bool, tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    name = _media(tmp_path, write, {"bytes": b"damaged", "path": None}, kind)
    source = choose_sources(make_config(name=name, streaming=streaming).dataset, "single").train[0]
    (row,) = source.read()
    assert row.data == {"prompt": "q", "completion": "x", kind: NOT_READ}
    expected = Example("q", ("x",), Origin("", 0), notes=("media_unread",))
    assert to_example(row.data, Origin("", 0), "single", RowColumns()) == expected


def test_a_column_of_bytes_is_no_text(tmp_path: Path, make_config: Make) -> None:
    pq.write_table(pa.table({"prompt": [b"q"], "completion": ["x"]}), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="wrong_type"):
        examples(str(tmp_path / "rows.parquet"), "single", make_config)
    pq.write_table(pa.table({"prompt": [b"q"]}), tmp_path / "rows.parquet")
    assert [row.data for row in choose_sources(
        make_config(name=str(tmp_path / "rows.parquet")).dataset, "single").train[0].read()
    ] == [{"prompt": NOT_READ}]  # fmt: skip


def test_decimals_are_numbers() -> None:
    tenths, wholes = pa.decimal128(4, 1), pa.decimal128(4, 0)
    table = pa.table(
        {
            "rewards": pa.array([[Decimal("0.5"), None]], pa.list_(tenths)),
            "label": pa.array([Decimal(1)], wholes),
            "meta": pa.array([{"score": Decimal("2.5")}], pa.struct([("score", tenths)])),
        }
    )
    (row,) = RowMaker(table.schema).rows(table)
    assert row == {"rewards": [0.5, None], "label": 1, "meta": {"score": 2.5}}
    assert not any(isinstance(value, Decimal) for value in (row["label"], *row["rewards"]))


def test_views_of_lists_are_lists() -> None:
    tool = pa.struct([("name", pa.string()), ("strict", pa.bool_())])
    table = pa.table({"tools": pa.array([[{"name": "add", "strict": None}]], pa.list_view(tool))})
    assert RowMaker(table.schema).rows(table) == [{"tools": [{"name": "add"}]}]


@pytest.mark.parametrize(
    ("values", "kind"), [([2**62, 1], pa.timestamp("us")), ([1, None], pa.timestamp("us", tz="No/Where"))]
)
def test_a_time_that_python_does_not_know_costs_no_row(values: list[int], kind: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    table = pa.table({"prompt": ["a", "b"], "completion": ["x", "y"], "seen": pa.array(values, kind)})
    pq.write_table(table, path)
    assert [row.data for row in read_parquet(path)] == [
        {"prompt": "a", "completion": "x", "seen": values[0]},
        {"prompt": "b", "completion": "y", "seen": values[1]},
    ]
