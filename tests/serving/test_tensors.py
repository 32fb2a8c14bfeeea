"""Tensors of the Open Inference Protocol: what is sent arrives, and what cannot be is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from modelcache.errors import InvalidInputError
from modelcache.serving.errors import RequestError
from modelcache.serving.open_inference_messages import (
    InferRequest,
    WantedOutput,
    decode_request,
    encode_response,
    parse_object,
)

FP32 = np.dtype(np.float32)
STEADY = settings(deadline=None, derandomize=True)


def tensor(
    data: Any = None, shape: Any = (1, 3), datatype: Any = "FP32", name: Any = "x", **more: Any
) -> dict[str, Any]:
    """Return a tensor as it stands in JSON; more than its data are ``parameters``."""
    described = {"name": name, "shape": list(shape) if isinstance(shape, tuple) else shape, "datatype": datatype}
    return described | ({} if data is None else {"data": data}) | ({"parameters": more} if more else {})


def decode(*inputs: Any, behind: bytes = b"", **more: Any) -> InferRequest:
    """Read a request of ``inputs``, with bytes ``behind`` the JSON."""
    text = json.dumps({"inputs": list(inputs), **more}).encode()
    return decode_request(text + behind, str(len(text)) if behind else None)


def decode_bytes(values: np.ndarray[Any, Any], datatype: str) -> np.ndarray[Any, Any]:
    described = tensor(None, values.shape, datatype, binary_data_size=values.nbytes)
    return decode(described, behind=values.tobytes()).rows


# Tensors in JSON


@pytest.mark.parametrize("data", [[1, 2.5, None, 4, 5, 6], [[1, 2.5, None], [4, 5, 6]]])
def test_numbers_in_json_are_rows(data: Any) -> None:
    """In one list or in one per row; null is missing."""
    rows = decode(tensor(data, (2, 3))).rows
    assert np.array_equal(rows, np.array([[1, 2.5, np.nan], [4, 5, 6]]), equal_nan=True)


def test_one_dimension_is_one_row() -> None:
    """The registry takes it as such."""
    assert decode(tensor([1, 2, 3], (3,))).rows.shape == (3,)


def test_nan_as_tritonclient_writes_it_is_missing() -> None:
    """It is no JSON, but what Python's and RapidJSON's writers make of missing values."""
    rows = decode(tensor([np.nan, np.inf, -np.inf])).rows
    assert np.array_equal(rows, np.array([[np.nan, np.inf, -np.inf]]), equal_nan=True)


@pytest.mark.parametrize(("datatype", "largest"), [("INT8", 127), ("UINT16", 65535), ("INT64", 2**63 - 1)])
def test_whole_numbers_keep_their_type(datatype: str, largest: int) -> None:
    """They are not rounded on the way to the registry; what is out of range is refused."""
    assert decode(tensor([0, 1, largest], datatype=datatype)).rows.tolist() == [[0, 1, largest]]
    with pytest.raises(InvalidInputError, match=f"out of the range of {datatype}"):
        decode(tensor([0, 1, largest + 1], datatype=datatype))


def test_booleans_are_rows() -> None:
    """As false and true in JSON, as bytes of which any but 0 is true."""
    assert decode(tensor([False, True, True], datatype="BOOL")).rows.tolist() == [[False, True, True]]
    assert decode_bytes(np.array([[0, 1, 7]], np.uint8), "BOOL").tolist() == [[False, True, True]]


# Tensors in bytes


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [
        *((f"FP{8 * size}", f"<f{size}") for size in (2, 4, 8)),
        *(
            (f"{sign}INT{8 * size}", f"<{kind}{size}")
            for sign, kind in (("", "i"), ("U", "u"))
            for size in (1, 2, 4, 8)
        ),
    ],
)
def test_bytes_are_rows_as_they_are(datatype: str, dtype: str) -> None:
    """Every numeric datatype of the protocol is NumPy's of the same size."""
    values = np.array([[1, 2, 3], [4, 5, 100]], dtype)
    rows = decode_bytes(values, datatype)
    assert rows.dtype == values.dtype and np.array_equal(rows, values)


def test_bf16_is_the_upper_half_of_a_float() -> None:
    """NumPy has no such type: it is made float32, which is exact."""
    values = np.array([[1.0, -2.5, np.nan]], np.float32)
    halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert np.array_equal(decode_bytes(halves, "BF16"), values, equal_nan=True)


@STEADY
@given(arrays.arrays(FP32, arrays.array_shapes(min_dims=1, max_dims=2), elements=st.floats(width=32)))
def test_floats_in_bytes_arrive_bit_by_bit(values: np.ndarray[Any, Any]) -> None:
    """NaN and infinities too, on the way in and on the way out."""
    assert decode_bytes(values, "FP32").tobytes() == values.tobytes()
    body, length = encode_response({}, [(WantedOutput("predict", binary=True), values)])
    assert length is not None and body[length:] == values.tobytes()
    assert json.loads(body[:length])["outputs"] == [
        {
            "name": "predict", "datatype": "FP32", "shape": list(values.shape),
            "parameters": {"binary_data_size": values.nbytes},
        }
    ]  # fmt: skip


@STEADY
@given(arrays.arrays(FP32, arrays.array_shapes(max_dims=2), elements=st.floats(width=32)))
def test_predictions_in_json_are_the_same_floats(values: np.ndarray[Any, Any]) -> None:
    """The text of each number is read as the same float32; what is not finite is null."""
    body, length = encode_response({}, [(WantedOutput("predict", binary=False), values)])
    answer = orjson.loads(body)["outputs"][0]
    expected = np.where(np.isfinite(values), values, np.nan)
    assert length is None and answer["shape"] == list(values.shape)
    read = np.array(answer["data"], np.float64).astype(np.float32).reshape(values.shape)
    assert np.array_equal(read, expected, equal_nan=True)


def test_tensors_of_one_feature_each_are_columns() -> None:
    """In JSON, in bytes, of different types and of both shapes; their names are those of the columns."""
    ages = np.array([7, 9], "<i8")
    request = decode(
        tensor([1.5, None], (2, 1), "FP64", "price", content_type="np"),
        tensor(None, (2,), "INT64", "age", binary_data_size=ages.nbytes),
        behind=ages.tobytes(),
        parameters={"content_type": "pd"},
    )
    assert request.columns == ("price", "age") and request.rows.dtype == np.float32
    assert np.array_equal(request.rows, [[1.5, 7], [np.nan, 9]], equal_nan=True)


# What is refused


@pytest.mark.parametrize(
    ("described", "match"),
    [
        (tensor([1, 2]), "takes 3 values, its data has 2"),
        (tensor([[1, 2, 3]], (3,)), "not of its shape"),
        (tensor([[1, 2], [3]], (2, 2)), "not of its shape"),
        (tensor([[1, 2], 3], (2, 2)), "not of its shape"),
        (tensor([[[1]], [2], [3]], (3, 1)), "FP32 holds list"),
        (tensor([], (0, 3)), r"of shape \[0, 3\]. Send \[rows, features\]"),
        (tensor([1, 2, 3], (-1, 3)), r"of shape \[-1, 3\]"),
        (tensor([1, 2, 3], (1, 1, 3)), "of shape"),
        (tensor([1], ()), "of shape"),
        (tensor([1], "3"), "of shape '3'"),
        (tensor([1], (True,)), "of shape"),
        (tensor([1], (1 << 64, 1 << 64)), "of shape"),
        (tensor([1], (1 << 62, 1 << 62)), "takes 21,267,647,932,558,653,966,460,912,964,485,513,216 values"),
        (tensor(["a", "b", "c"], datatype="BYTES"), "'BYTES', which .* send one of .* FP64, BF16. Send categories"),
        (tensor([1, 2, 3], datatype="STRING"), "datatype 'STRING', which no model"),
        (tensor([1, 2, 3], datatype=["FP32"]), "datatype"),
        (tensor([1, 2, 3], datatype="FP16"), "FP16 in JSON. Send its bytes"),
        (tensor([1, "2", 3]), "FP32 holds str. Send numbers, or null"),
        (tensor([1, True, 3]), "FP32 holds bool"),
        (tensor([1, 2.0, None], datatype="INT32"), "INT32 holds NoneType, float"),
        (tensor("123"), "no list of data, and no binary_data_size"),
        (tensor(None), "no list of data"),
        (tensor([1, 2, 3], binary_data_size=12), "has data and binary_data_size"),
        (tensor(None, binary_data_size=11), "takes 12 bytes, binary_data_size is 11"),
        (tensor(None, binary_data_size=-12), "binary_data_size is -12"),
        (tensor(None, binary_data_size="12"), "binary_data_size is '12'"),
        (tensor(None, binary_data_size=12), "takes 12 bytes behind the JSON, there are 0 left"),
        (tensor(None, (1 << 62, 1 << 62), binary_data_size=1 << 63), "binary_data_size is"),
    ],
)
def test_a_tensor_that_does_not_add_up_is_refused(described: dict[str, Any], match: str) -> None:
    """Before anything is allocated for what it claims to be."""
    with pytest.raises(InvalidInputError, match=match):
        decode(described)


def test_bytes_that_belong_to_nobody_are_refused() -> None:
    """They would be a tensor that is taken for another."""
    with pytest.raises(InvalidInputError, match="5 bytes are left behind the last tensor"):
        decode(tensor([1, 2, 3]), behind=b"12345")
    with pytest.raises(InvalidInputError, match="takes 12 bytes behind the JSON, there are 3 left"):
        decode(tensor(None, binary_data_size=12), behind=b"123")


def test_columns_of_different_lengths_are_refused() -> None:
    """And so is a matrix beside another tensor."""
    with pytest.raises(InvalidInputError, match=r"'b' is of shape \[3\], and there are 2 inputs"):
        decode(tensor([1, 2], (2,), name="a"), tensor([1, 2, 3], (3,), name="b"))
    with pytest.raises(InvalidInputError, match=r"'a' is of shape \[2, 2\]"):
        decode(tensor([1, 2, 3, 4], (2, 2), name="a"), tensor([1, 2], (2,), name="b"))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"inputs": []}, "'inputs' has to be a list of one tensor or more"),
        ({"inputs": {"x": 1}}, "'inputs' has to be"),
        ({"inputs": [7]}, "Each of the 'inputs' has to be an object with a name"),
        ({"inputs": [tensor([1, 2, 3], name="")]}, "object with a name"),
        ({"inputs": [tensor([1, 2, 3])] * 2}, "names of the 'inputs' are not different"),
        ({"inputs": [tensor(None, shared_memory_region="r")]}, "asks for shared_memory_region, which is not offered"),
        ({"inputs": [tensor([1, 2, 3]) | {"parameters": []}]}, "'parameters' that are no object"),
        ({"parameters": "fast"}, "The request has 'parameters' that are no object"),
        ({"parameters": {"binary_data_output": "yes"}}, "'binary_data_output' has to be true or false"),
        ({"parameters": {"timeout": "soon"}}, "'timeout' is 'soon': it has to be a whole number of microseconds"),
        ({"parameters": {"timeout": -1}}, "'timeout' is -1"),
        ({"parameters": {"timeout": True}}, "'timeout' is True"),
        ({"id": 7}, "'id' has to be text"),
        ({"id": "\ud800", "inputs": [tensor([np.nan, 1, 2])]}, "'id' has to be text"),
        ({"outputs": "predict"}, "'outputs' has to be a list"),
        ({"outputs": [{"name": "proba"}]}, "no output 'proba'. Ask for predict, margin, leaf, contribs"),
        ({"outputs": [{"name": "predict"}] * 2}, "names of the 'outputs' are not different"),
        ({"outputs": [{"name": "predict", "parameters": {"classification": 3}}]}, "asks for classification"),
        ({"outputs": [{"name": "predict", "parameters": {"binary_data": 1}}]}, "'binary_data' has to be true or false"),
    ],
)
def test_a_request_that_is_none_of_the_protocol_is_refused(more: dict[str, Any], match: str) -> None:
    """With what it should be."""
    request = {"inputs": [tensor([1, 2, 3])], **more}
    with pytest.raises(RequestError, match=match):
        decode_request(json.dumps(request).encode(), None)


@pytest.mark.parametrize(
    ("body", "length", "match"),
    [
        (b"", None, "The body is no JSON"),
        (b"[1]", None, "has to be a JSON object"),
        (b"{" * 100_000, None, "is no JSON"),
        (b"[" * 100_000 + b"NaN", None, "is no JSON"),
        (b"\xff{}", None, "is no JSON"),
        (b'{"inputs": NaN', None, "is no JSON"),
        (b"{}", "3", "says that 3 bytes are JSON, the body has 2"),
        (b"{}", "-1", "has to be a number of bytes"),
        (b"{}", "2.0", "has to be a number of bytes"),
        (b"{}", "\u00b2", "has to be a number of bytes"),
        (b"{}", "9" * 5000, "has to be a number of bytes"),
        (b"{}", "1", "is no JSON"),
        (b"{}", "0", "is no JSON"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(body: bytes, length: str | None, match: str) -> None:
    """Neither its JSON nor its header may be made up."""
    with pytest.raises(RequestError, match=match):
        decode_request(body, length)


# What is asked for


def test_the_prediction_is_asked_for_by_default() -> None:
    """As bytes if the request says so, as tritonclient does."""
    assert decode(tensor([1, 2, 3])).outputs == (WantedOutput("predict", binary=False),)
    asked = decode(tensor([1, 2, 3]), outputs=[], parameters={"binary_data_output": True}).outputs
    assert asked == (WantedOutput("predict", binary=True),)


def test_outputs_are_asked_for_by_name() -> None:
    """What an output says of itself goes before what the request says of all."""
    outputs = [{"name": "leaf", "parameters": {"binary_data": False}}, {"name": "predict"}]
    asked = decode(tensor([1, 2, 3]), outputs=outputs, parameters={"binary_data_output": True}).outputs
    assert asked == (WantedOutput("leaf", binary=False), WantedOutput("predict", binary=True))


def test_the_timeout_is_in_microseconds() -> None:
    """As Triton's; 0 is none."""
    assert decode(tensor([1, 2, 3]), parameters={"timeout": 1_500_000}).timeout == 1.5
    assert decode(tensor([1, 2, 3]), parameters={"timeout": 0}).timeout is None


def test_outputs_in_bytes_and_in_json_can_be_mixed() -> None:
    """Bytes are in the order of the outputs."""
    values = np.arange(4, dtype=np.float32).reshape(2, 2)
    wanted = [
        (WantedOutput(name, binary=name != "margin"), values + n)
        for n, name in enumerate(["leaf", "margin", "predict"])
    ]
    body, length = encode_response({"id": "7"}, wanted)
    assert body[length:] == values.tobytes() + (values + 2).tobytes()
    answer = json.loads(body[:length])
    assert answer["id"] == "7" and answer["outputs"][1]["data"] == [1, 2, 3, 4]


def test_an_empty_body_is_an_empty_object() -> None:
    """Where the protocol lets it be left out."""
    assert parse_object(b" ") == {} == parse_object(b"{}")


# Whatever comes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
KEYS = ("inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data", "binary_data_size", "timeout")


def survives(body: bytes, length: str | None) -> None:
    """An answer or a typed error, and nothing else."""
    try:
        found = decode_request(body, length)
    except (InvalidInputError, RequestError) as error:
        assert error.http_status == 400
    else:
        assert found.rows.dtype.kind in "fiub" and found.rows.ndim in (1, 2) and found.rows.size


@STEADY
@given(st.binary(max_size=200) | JSON.map(lambda found: json.dumps(found).encode()), st.none() | st.text(max_size=4))
def test_any_bytes_get_an_answer_or_a_typed_error(body: bytes, length: str | None) -> None:
    """Whatever they are."""
    survives(body, length)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """Return a request of two columns with other values at some places, and other bytes at others."""
    first, second = tensor([1, 2], (2,), name="a"), tensor(None, (2, 1), "INT16", "b", binary_data_size=4)
    output, parameters = {"name": "predict", "parameters": {"binary_data": True}}, {"timeout": 5}
    request = {"id": "1", "inputs": [first, second], "outputs": [output], "parameters": parameters}
    places: list[dict[str, Any]] = [request, first, second, second["parameters"], output, parameters]
    for place in draw(st.lists(st.sampled_from(places), max_size=2)):
        place[draw(st.sampled_from(KEYS))] = draw(JSON)
    text = bytearray(json.dumps(request).encode())
    for index in draw(st.lists(st.integers(0, len(text) - 1), max_size=1)):
        text[index] = draw(st.integers(0, 255))
    length = draw(st.sampled_from([str(len(text))] * 5 + [None, str(len(text) - 1)]))
    return bytes(text) + draw(st.just(b"\0\1\0\2") | st.binary(max_size=5)), length


@STEADY
@given(mutated())
def test_a_mutated_request_gets_an_answer_or_a_typed_error(request: tuple[bytes, str | None]) -> None:
    """Wherever it is damaged."""
    survives(*request)
