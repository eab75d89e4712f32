"""Headers of safetensors files that lie, and any bytes at all: read as the library reads them, or a typed error."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from fastmoe_cpp.checkpoint import (
    CheckpointError,
    FileFormatError,
)
from fastmoe_cpp.checkpoint.files import read_header

from . import make
from .refusals import json_values, refused


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty file": (b"", "at least 8 bytes"),
    "seven bytes": (b"\0" * 7, "at least 8 bytes"),
    "a header of gigabytes": (struct.pack("<Q", 1 << 40) + b"{}", "at most 100000000 bytes, it claims 1099511627776"),
    "a negative header": (struct.pack("<q", -1) + b"{}", "at most 100000000"),
    "a truncated header": (raw({"a": tensor([1], 0, 4)}, length=5000), "claims 5000 bytes"),
    "no JSON": (raw(b"{oops"), "must be JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "must be JSON"),
    "a list": (raw(b"[]"), "must begin with"),
    "nested beyond reason": (raw(b'{"a":' * 20000 + b"1" + b"}" * 20000), "must be JSON"),
    "a name twice": (raw(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                         b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), "'a' must occur once"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "an unknown dtype": (raw({"a": tensor([1], 0, 4, "F31")}, b"1234"), "dtype of a must be one of .* got 'F31'"),
    "a dtype that is no word": (raw({"a": tensor([1], 0, 4, ["F32"])}, b"1234"), "dtype of a must be one of"),
    "a negative size": (raw({"a": tensor([-1], 0, 4)}, b"1234"), "shape of a"),
    "a size that is true": (raw({"a": tensor([True], 0, 4)}, b"1234"), "shape of a"),
    "a size beyond 64 bits": (raw({"a": tensor([1 << 70], 0, 4)}, b"1234"), "shape of a"),
    "sizes whose product wraps": (raw({"a": tensor([1 << 32, 1 << 32], 0, 0)}), "must have .* bytes"),
    "a span of the wrong size": (raw({"a": tensor([2], 0, 4)}, b"1234"), "must have 8 bytes, data_offsets give it 4"),
    "a span backwards": (raw({"a": tensor([1], 4, 0)}, b"1234"), "ascending"),
    "overlapping spans": (raw({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, b"x" * 12), "overlaps a"),
    "one span twice": (raw({"a": tensor([1], 0, 4), "b": tensor([1], 0, 4)}, b"1234"), "b must begin .* overlaps a"),
    "a gap": (raw({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, b"x" * 12), "leaves a gap after a"),
    "truncated data": (raw({"a": tensor([4], 0, 16)}, b"x" * 15), "truncated"),
    "data after the end": (raw({"a": tensor([1], 0, 4)}, b"x" * 5), "longer than its header"),
    "another key": (raw({"a": {**tensor([1], 0, 4), "x": 1}}, b"1234"), "nothing else"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies(case, tmp_path):
    content, words = HEADERS[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        read_header(file)
    make.write(
        tmp_path, make.layer_tensors("qwen3_moe", "qwen3_moe", make.parts("qwen3_moe", 0), 0), make.CONFIGS["qwen3_moe"]
    )
    file.write_bytes(content)
    refused(tmp_path, FileFormatError, words)


VALID = raw(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor([2, 2], 0, 16),
        "b": tensor([3], 16, 22, "BF16"),
        "c": tensor([0, 5], 22, 22),
    },
    bytes(22),
)


def test_a_valid_header(tmp_path):
    file = tmp_path / "valid.safetensors"
    file.write_bytes(VALID)
    found = read_header(file)
    assert {name: (info.dtype, info.shape, info.nbytes) for name, info in found.items()} == {
        "a": ("F32", (2, 2), 16), "b": ("BF16", (3,), 6), "c": ("F32", (0, 5), 0),
    }  # fmt: skip


def agrees_with_the_library(content: bytes, file: Path) -> None:
    """What we accept the library accepts, with the same names and shapes; everything else is a CheckpointError."""
    file.write_bytes(content)
    try:
        ours = read_header(file)
    except CheckpointError:
        return
    try:
        with safe_open(file, framework="pt") as opened:
            theirs = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"we accept what the library refuses: {error}") from error
    assert {name: info.shape for name, info in ours.items()} == theirs


@settings(max_examples=300)
@given(st.binary(max_size=200))
@example(VALID)
def test_any_bytes_are_a_header_or_a_typed_error(tmp_path_factory, content):
    agrees_with_the_library(content, tmp_path_factory.getbasetemp() / "bytes.safetensors")


@settings(max_examples=600)
@given(st.data())
def test_any_change_to_a_file_is_read_or_a_typed_error(tmp_path_factory, data):
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "put"]))
        if how == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif how == "cut" and len(content) > 2:
            del content[at]
        else:
            content.insert(at, data.draw(st.sampled_from(list(b'0123456789{}[]",:aF'))))
    agrees_with_the_library(bytes(content), tmp_path_factory.getbasetemp() / "changed.safetensors")


entries = st.fixed_dictionaries(
    {},
    optional={"dtype": json_values, "shape": json_values | st.lists(st.integers(0, 4), max_size=3),
              "data_offsets": json_values | st.lists(st.integers(0, 40), min_size=2, max_size=2)},
)  # fmt: skip


@settings(max_examples=300)
@given(st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3), st.integers(0, 40))
def test_any_json_is_a_header_or_a_typed_error(tmp_path_factory, header, size):
    agrees_with_the_library(raw(header, bytes(size)), tmp_path_factory.getbasetemp() / "json.safetensors")
