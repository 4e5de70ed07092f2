"""The two readers below CALVIN's converter: zip archives piece by piece, and pickles that are never run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modip.data import pickles, zips


def reader(data: bytes) -> zips.Read:
    return lambda offset, length: data[offset : offset + length]


def packed(
    files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, comment: bytes = b""
) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.comment = comment
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"x" * 3000])
def test_what_zipfile_writes_is_read(method: int, comment: bytes) -> None:
    files = {f"folder/{n}": os.urandom(n) + bytes(n) for n in range(300)}
    data = packed(files, method, comment)
    found = {
        m.name.decode(): zips.content(reader(data), m)
        for m in zips.members(reader(data), len(data))
    }
    assert found == files


def test_a_list_longer_than_a_window_and_64_bit_offsets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        zipfile, "ZIP64_LIMIT", 100
    )  # zipfile writes the 64-bit records from here on
    monkeypatch.setattr(zips, "_WINDOW", 200)
    files = {f"{n}": os.urandom(n) for n in range(50)}
    data = packed(files, zipfile.ZIP_STORED)
    assert b"PK\6\6" in data
    found = {
        m.name.decode(): zips.content(reader(data), m)
        for m in zips.members(reader(data), len(data))
    }
    assert found == files


@given(st.data())
def test_damage_is_an_error_not_an_answer(data: st.DataObject) -> None:
    files = {"a.npy": bytes(range(200)), "b.npy": b"b" * 999}
    whole = bytearray(packed(files))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        for member in zips.members(reader(cut), len(cut)):
            content = zips.content(reader(cut), member)
            assert content in files.values()
    except zipfile.BadZipFile:
        pass


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", ">f4", "<i8", "|b1"])
def test_arrays_are_what_numpy_saved(dtype: str) -> None:
    for shape in [(), (5,), (3, 4)]:
        buffer, array = io.BytesIO(), np.ones(shape, dtype)
        np.save(buffer, array)
        np.testing.assert_array_equal(zips.array(buffer.getvalue()), array)
        assert zips.array(buffer.getvalue()).dtype == array.dtype


def test_arrays_of_objects_and_damaged_ones_are_refused() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array({"a": 1}))
    with pytest.raises(ValueError, match="Python objects"):
        zips.array(buffer.getvalue())
    np.save(buffer := io.BytesIO(), np.ones(9))
    for cut in (0, 5, 20, 100, 150):
        with pytest.raises(ValueError, match="."):
            zips.array(buffer.getvalue()[:cut])


VALUE: dict[str, Any] = {
    "text": ["öpen the drawer", "x" * 300],
    "numbers": [0, 1, 300, 70_000, -1, 2**40, -(2**70), 0.5, None, True, False],
    "nested": {"tuple": (1, (2, 3, 4, 5), ()), "bytes": b"\0\1", "same": []},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_pickle_reads(protocol: int) -> None:
    value = {k: v for k, v in VALUE.items() if protocol > 2 or k != "nested"}
    value["again"] = [value["text"], value["text"]]
    assert pickles.plain(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpys_integers_are_read_without_making_them(protocol: int) -> None:
    for number in (np.int64(5), np.int32(-7), np.uint8(200), np.int64(2**40), 12):
        assert pickles.integer(pickles.plain(pickle.dumps(number, protocol))) == int(number)
    for other in ("5", 0.5, None, np.float64(1)):
        with pytest.raises(ValueError, match="."):
            pickles.integer(pickles.plain(pickle.dumps(other, protocol)))


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    attack = pickle.dumps({"language": [Evil(witness)]}, protocol)
    with pytest.raises(ValueError, match="asks to run|more than plain values"):
        pickles.plain(attack)
    assert not witness.exists()
    pickle.loads(attack)  # noqa: S301 - and it would have
    assert witness.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # as text
        b"\x80\x04\x8c\x05numpy\x8c\x04load\x93\x8c\x01x\x85R.",  # another function of numpy
        b"\x80\x04\x8c\x05numpy\x8c\x05dtype\x93\x8c\x01x\x85\x81.",  # NEWOBJ
        b"\x80\x02Pid\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x04K\x01K\x02R.",  # a call of a number
        b"\x80\x04K\x01}b.",  # the state of a number
        b"\x80\x04]K\x01s.",  # an item of a list, by a number
        b"\x80\x04}]K\x01s.",  # a list as a key
        b"\x80\x04e.",  # no mark
        b"\x80\x04.",  # nothing
        b"\x80\x04K\x01",  # no end
        b"\x80\x04h\x07.",  # what was never kept
        b"",
        b"hello",
    ],
)
def test_other_pickles_are_refused(attack: bytes) -> None:
    with pytest.raises(ValueError, match="."):
        pickles.plain(attack)


@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 400))
def test_no_bytes_make_it_do_anything_but_refuse(noise: bytes, at: int, end: int) -> None:
    good = pickle.dumps(VALUE, 4)
    for data in (b"\x80\x04" + noise, good[:at] + noise + good[end:]):
        with contextlib.suppress(ValueError):
            pickles.plain(data)
