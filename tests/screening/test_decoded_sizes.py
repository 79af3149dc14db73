"""Small Parquet and Arrow files that decode to a lot are refused before they are decoded."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.errors import UsageError
from reft_ray.screening import columnar, decoded_sizes
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files, read_units
from reft_ray.screening.sources import find_sources

ROWS = pa.table(
    {
        "prompt": [f"{'tell me about tea ' * (i % 7)}{i}" for i in range(3000)],
        "response": ["a cup"] * 3000,
        "tags": [["one", str(i), None] for i in range(3000)],
        "more": [{"n": i, "t": None if i % 2 else "x" * 50} for i in range(3000)],
    }
)


def rows_of(path) -> list[dict]:
    (plan,) = plan_files(find_sources([str(path)]), Limits())
    return [row for unit in read_units(plan, plan.cuts.ranges) for row in unit.native.to_pylist()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zstd"},
        {"compression": "none"},
        {"use_dictionary": False},
        {"data_page_version": "2.0"},
        {"data_page_size": 500, "write_page_index": True},
        {"row_group_size": 700},
    ],
)
def test_parquet_files_of_every_kind_are_read_and_their_pages_found(tmp_path, options) -> None:
    pq.write_table(ROWS, tmp_path / "rows.parquet", **options)
    assert rows_of(tmp_path / "rows.parquet") == ROWS.to_pylist()
    with pa.OSFile(str(tmp_path / "rows.parquet")) as stored:
        metadata = pq.ParquetFile(stored).metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
            found = decoded_sizes.group_size(stored, metadata, group, "rows")
            # The footer counts the pages' headers, too.
            assert 0.5 < found.total / sum(column.total_uncompressed_size for column in columns) <= 1


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_files_of_every_kind_are_read(tmp_path, kind, compression) -> None:
    table = ROWS.set_column(1, "response", ROWS["response"].dictionary_encode())
    with kind(
        str(tmp_path / "rows.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)
    ) as to:
        to.write_table(table, max_chunksize=1000)
    assert rows_of(tmp_path / "rows.arrow") == ROWS.to_pylist()


def bomb(path, container: str, columns: int, size: int, **options) -> None:
    table = pa.table({f"c{index}": ["x" * size] for index in range(columns)})
    if container == "parquet":
        pq.write_table(table, path, **({"compression": "zstd"} | options))
    else:
        with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as to:
            to.write_table(table)


@pytest.mark.parametrize(
    ("container", "columns", "size", "message"),
    [
        ("parquet", 1, 3 << 20, "a page of column c0 has 3,145,7"),
        ("parquet", 8, 1 << 19, "in its largest pages"),
        ("arrow", 1, 3 << 20, "a compressed batch has 3,145,"),
        ("arrow", 8, 1 << 19, "a compressed batch has"),
    ],
)
def test_what_decodes_to_too_much_is_refused_undecoded(
    tmp_path, monkeypatch, container: str, columns: int, size: int, message: str
) -> None:
    monkeypatch.setattr(decoded_sizes, "PAGE_BYTES", 1 << 20)
    monkeypatch.setattr(decoded_sizes, "TOGETHER_BYTES", 2 << 20)
    path = tmp_path / f"rows.{container}"
    bomb(path, container, columns, size)
    before = pa.total_allocated_bytes()
    pa.default_memory_pool().release_unused()
    with pytest.raises(UsageError, match=message):
        plan_files(find_sources([str(path)]), Limits())
    assert path.stat().st_size < 4096
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_an_encoding_whose_size_is_unknown_is_refused(tmp_path) -> None:
    encoding = {"use_dictionary": False, "column_encoding": {"c0": "DELTA_BYTE_ARRAY"}}
    bomb(tmp_path / "rows.parquet", "parquet", 1, 10, **encoding)
    with pytest.raises(UsageError, match="DELTA_BYTE_ARRAY"):
        plan_files(find_sources([str(tmp_path / "rows.parquet")]), Limits())


def test_memory_that_arrow_does_not_get_is_a_bad_file(tmp_path, monkeypatch) -> None:
    pq.write_table(ROWS, tmp_path / "rows.parquet")

    def fail(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 500000000 failed")

    monkeypatch.setattr(columnar, "row_sizes", fail)
    with pytest.raises(UsageError, match="malloc of size"):
        plan_files(find_sources([str(tmp_path / "rows.parquet")]), Limits())


def test_damaged_headers_are_one_line(tmp_path) -> None:
    pq.write_table(ROWS, tmp_path / "rows.parquet")
    whole = (tmp_path / "rows.parquet").read_bytes()
    for at in (4, 5, 6, 7, 8, 20, 40):
        (tmp_path / "rows.parquet").write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            (plan,) = plan_files(find_sources([str(tmp_path / "rows.parquet")]), Limits())
            assert sum(len(unit.rows) for unit in read_units(plan, plan.cuts.ranges)) == len(ROWS)
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017
