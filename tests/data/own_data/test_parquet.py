"""Tables in parquet files: images as paths, bytes and HF's struct, read as a stream."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gdro_cli.data.own_data import cells, read_own_data
from gdro_cli.data.own_data.parquet import read_parquet_rows
from gdro_cli.errors import PrerequisiteError, UserError
from tests.support.own_data import all_scores, image_bytes, refusal, save_images, write_parquet

KITE = "a red kite"
PICTURES = [image_bytes(grey) for grey in range(0, 250, 5)]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pick_a_pic(path: Path, count: int = 3, **options: Any) -> Path:
    """The columns of Pick-a-Pic with ``count`` rows; the last is a tie."""
    labels = [1.0, 0.0] * (count // 2) + [0.5] * (count % 2)
    columns = {
        "are_different": [True] * count,
        "caption": [f"{KITE} {row}" for row in range(count)],
        "created_at": pa.array([row * 1_000_000_001 for row in range(count)], pa.timestamp("ns")),
        "has_label": [True] * count,
        "jpg_0": PICTURES[:count],
        "jpg_1": PICTURES[count : 2 * count],
        "label_0": labels,
        "label_1": [1 - label for label in labels],
    }
    return write_parquet(path, columns, **options)


def test_pick_a_pic(tmp_path: Path) -> None:
    data = read_own_data(pick_a_pic(tmp_path / "data.parquet", row_group_size=2))
    assert data.form == "pairs"
    assert data.notes == ("1 tie gives both images 0.5",)
    assert all_scores(data)[1] == (
        f"{KITE} 1",
        {"data.parquet row 1 jpg_0": {"preference": 0.0}, "data.parquet row 1 jpg_1": {"preference": 1.0}},
    )
    assert [group.where for group in data.groups][2] == "data.parquet row 2"
    sources = [image.source for group in data.groups for image in group.images]
    expected = [picture for row in range(3) for picture in (PICTURES[row], PICTURES[3 + row])]
    assert [source.read() for source in sources] == expected
    assert [source.size() for source in sources] == [len(picture) for picture in expected]
    assert [(source.row, source.column) for source in sources[-2:]] == [(2, "jpg_0"), (2, "jpg_1")]


def test_cells_are_read_in_any_order(tmp_path: Path) -> None:
    data = read_own_data(pick_a_pic(tmp_path / "data.parquet", 25, row_group_size=10))
    sources = [group.images[0].source for group in data.groups]
    order = [24, 0, 3, 2, 17, 16, 9, 10, 24, 1]
    assert [sources[row].read() for row in order] == [PICTURES[row] for row in order]


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    data = read_own_data(pick_a_pic(tmp_path / "data.parquet", 25))
    sources = [group.images[0].source for group in data.groups]

    def is_right(row: int) -> bool:
        return sources[row].read() == PICTURES[row]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(is_right, [*range(25)] * 40))
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The row groups and columns of each reading that started."""
    calls: list[tuple[Any, ...]] = []
    iter_batches = pq.ParquetFile.iter_batches

    def count(file: pq.ParquetFile, *given: Any, columns: list[str], **options: Any) -> Any:
        calls.append((*given[1:], columns))
        return iter_batches(file, *given, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", count)
    return calls


def test_rows_in_order_are_decoded_once(tmp_path: Path, started: list[tuple[Any, ...]]) -> None:
    data = read_own_data(pick_a_pic(tmp_path / "data.parquet", 25, row_group_size=10))
    started.clear()
    read = [image.source.read() for group in data.groups for image in group.images]
    assert read == [picture for row in range(25) for picture in (PICTURES[row], PICTURES[25 + row])]
    assert started == [(range(3), ["jpg_0"]), (range(3), ["jpg_1"])]


def test_a_step_ahead_leaves_out_row_groups(tmp_path: Path, started: list[tuple[Any, ...]]) -> None:
    data = read_own_data(pick_a_pic(tmp_path / "data.parquet", 25, row_group_size=5))
    started.clear()
    assert [data.groups[row].images[0].source.read() for row in (0, 5, 24)] == [PICTURES[row] for row in (0, 5, 24)]
    assert started == [(range(5), ["jpg_0"]), (range(4, 5), ["jpg_0"])]


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """One row group, as pandas writes it; its pages have 1024 rows, 8 MB each."""
    count = 4 * 1024
    path = tmp_path / "data.parquet"
    cells = [row.to_bytes(4, "big") * 2000 for row in range(count)]
    write_parquet(path, {"prompt": [str(row) for row in range(count)], "image": cells}, use_dictionary=False)
    assert pq.ParquetFile(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    scanned = [pa.total_allocated_bytes() for _ in read_parquet_rows(path)]
    data = read_own_data(path)
    read = []
    for cell, group in zip(cells, data.groups, strict=True):
        assert group.images[0].source.read() == cell
        read.append(pa.total_allocated_bytes())
    assert 4e6 < max(scanned) - before < 20e6
    assert 4e6 < max(read) - before < 20e6


@pytest.mark.parametrize("kind", ["paths", "bytes", "large bytes", "struct", "struct with paths"])
def test_images_of_every_kind(tmp_path: Path, kind: str) -> None:
    save_images(tmp_path, "a.png", "b.png")
    raw = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    image = {
        "paths": pa.array(["a.png", "b.png"]),
        "bytes": pa.array(raw, pa.binary()),
        "large bytes": pa.array(raw, pa.large_binary()),
        "struct": pa.array([{"bytes": data, "path": None} for data in raw], HF_IMAGE),
        "struct with paths": pa.array([{"bytes": None, "path": name} for name in ("a.png", "b.png")], HF_IMAGE),
    }[kind]
    path = write_parquet(tmp_path / "data.parquet", {"prompt": [KITE, KITE], "image": image, "score": [0.5, None]})
    (group,) = read_own_data(path).groups
    assert [image.source.read() for image in group.images] == raw
    assert [image.source.size() for image in group.images] == [len(data) for data in raw]
    assert [dict(image.scores) for image in group.images] == [{"score": 0.5}, {}]


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.list_(HF_IMAGE), pa.large_list(pa.binary())])
def test_groups_with_lists_of_images(tmp_path: Path, kind: pa.DataType) -> None:
    lists: list[list[Any]] = [PICTURES[:2], PICTURES[2:5]]
    if kind == pa.list_(HF_IMAGE):
        lists = [[{"bytes": data, "path": "x.png"} for data in pictures] for pictures in lists]
    columns = {
        "prompt": ["one", "two"],
        "images": pa.array(lists, kind),
        "scores": pa.array([{"a": [1, 2], "b": None}, {"a": [1, 2, 3], "b": [4, None, 6]}]),
        "metadata": [{"n": 1}, {"n": 2}],
    }
    data = read_own_data(write_parquet(tmp_path / "data.parquet", columns))
    assert all_scores(data)[1] == (
        "two",
        {
            "data.parquet row 1 images[0]": {"a": 1.0, "b": 4.0},
            "data.parquet row 1 images[1]": {"a": 2.0},
            "data.parquet row 1 images[2]": {"a": 3.0, "b": 6.0},
        },
    )
    assert [image.source.read() for group in data.groups for image in group.images] == PICTURES[:5]
    assert [group.record.metadata["n"] for group in data.groups] == [1, 2]


def test_all_parquet_files_of_a_folder(tmp_path: Path) -> None:
    for name, row in (("b", 1), ("a", 0)):
        write_parquet(tmp_path / f"{name}.parquet", {"text": [KITE], "image": [PICTURES[row]]})
    data = read_own_data(tmp_path)
    assert all_scores(data) == [(KITE, {"a.parquet row 0 image": {}, "b.parquet row 0 image": {}})]
    assert [image.source.read() for image in data.groups[0].images] == PICTURES[:2]


def test_unknown_columns_are_not_read(tmp_path: Path, started: list[tuple[Any, ...]]) -> None:
    columns = {"prompt": [KITE], "image": [PICTURES[0]], "zz": [PICTURES[1]]}
    data = read_own_data(write_parquet(tmp_path / "data.parquet", columns))
    assert data.notes == ("keys that no form has were ignored: `zz` in 1 line",)
    assert started == [(["prompt", "image"],)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": pa.array([None], pa.binary())}, "row 0: image must be one image, not null"),
        ({"image": [b""]}, "row 0: the image in the column image is empty"),
        ({"image": ["none.png"]}, "row 0: the image none.png is missing"),
        ({"score": [float("nan")]}, "row 0: score must be a finite number, not nan"),
        ({"prompt": [""]}, "row 0: the prompt is empty"),
        ({"metadata": pa.array([{"t": 0}], pa.struct([("t", pa.time32("s"))]))}, "metadata must have only values that"),
    ],
)
def test_a_bad_row(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    columns = {"prompt": [KITE], "image": [PICTURES[0]], "score": [0.5], **change}
    assert said in refusal(write_parquet(tmp_path / "data.parquet", columns))


def test_wrong_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.parquet", {"prompt": [KITE], "picture": [PICTURES[0]]})
    assert f"{path} row 0: its keys (prompt, picture) fit no form" in refusal(path)


def test_a_table_without_rows(tmp_path: Path) -> None:
    columns = {"prompt": pa.array([], pa.string()), "image": pa.array([], pa.binary())}
    assert "has no data" in refusal(write_parquet(tmp_path / "data.parquet", columns))


@pytest.mark.parametrize("damage", ["not parquet", "cut"])
def test_a_damaged_file(tmp_path: Path, damage: str) -> None:
    path = pick_a_pic(tmp_path / "data.parquet", 20, compression="none")
    path.write_bytes(b"PNG" if damage == "not parquet" else path.read_bytes()[:-100])
    assert "is not a whole parquet file" in refusal(path)


def test_a_damaged_cell(tmp_path: Path) -> None:
    path = pick_a_pic(tmp_path / "data.parquet", 20)
    source = read_own_data(path).groups[3].images[0].source
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"\xff" * (len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(UserError, match=r"the image data\.parquet row 3 jpg_0 cannot be read"):
        source.read()


def test_a_file_that_was_exchanged(tmp_path: Path) -> None:
    path = pick_a_pic(tmp_path / "data.parquet", 20)
    source = read_own_data(path).groups[19].images[0].source
    write_parquet(path, {"jpg_0": [PICTURES[0]]})
    with pytest.raises(UserError, match=r"row 19 jpg_0 cannot be read \(it was changed and has no such cell\)"):
        source.read()


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pick_a_pic(tmp_path / "data.parquet")
    monkeypatch.setattr(cells, "find_spec", lambda name: None)
    with pytest.raises(PrerequisiteError, match=r"needs the package pyarrow: run `pip install 'gdro_cli\[data\]'`"):
        read_own_data(path)
