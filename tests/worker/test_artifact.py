"""Rules A1 and A2: what an artifact is, which bytes of it are the model, and what is refused."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from base64 import b64decode
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import xgboost as xgb
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.worker import archive
from modelcache.worker.artifact import ArtifactError, ArtifactReader, Limits, Unpacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# A stump that xgboost-cpu 2.1.4 wrote with save_raw("deprecated"): later ones cannot.
LEGACY = zlib.decompress(
    b64decode(
        "eNpLysxLY2A4YM/EAAGMUJoJymZEEqM1EIDSRanpVsWFpYlFqSmpRUX5RWxQ8fSkkqLUVHq6iBwAchszEp9pELj3PxAwQt0CAQ0OIOI/"
        "FIBEzp3x2QdTiyRmt3qVlgNMPZKRDjD1SHw7BrRUxAml85OyUpNLMstSXaEC1Up5ibmpSlZK6HGtpAMSis/JLy6OL0gsSsxVsqpWKk5O"
        "zEmNL8gvji9PzUzPKAHqM1SqrQUA66VLEw=="
    )
)

SETTINGS = settings(max_examples=150, deadline=None)


class Models(NamedTuple):
    """One booster and the forms it comes in."""

    booster: xgb.Booster
    ubj: bytes
    json: bytes


@functools.cache
def trained() -> Models:
    rows = np.random.default_rng(7).random((60, 4), dtype=np.float32)
    data = xgb.DMatrix(rows, rows.sum(axis=1))
    booster = xgb.train({"max_depth": 2, "nthread": 1}, data, num_boost_round=2)
    return Models(booster, bytes(booster.save_raw("ubj")), bytes(booster.save_raw("json")))


@pytest.fixture(scope="session")
def models() -> Models:
    return trained()


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def packed(*members: tuple[tarfile.TarInfo, bytes], layout: int = tarfile.PAX_FORMAT, mode: str = "gz") -> bytes:
    """Pack a tar; 'gz' or '' as the mode."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if data else None)
    plain = file.getvalue()
    return gzip.compress(plain, mtime=0) if mode == "gz" else plain


def block_with(data: bytes, at: int, field: bytes, *, sign: bool = True) -> bytes:
    """Change a tar's first header, and its checksum with it."""
    block = bytearray(data[:512])
    block[at : at + len(field)] = field
    if sign:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


def read(data: bytes, cuts: Iterable[int] = (), limits: Limits | None = None) -> Unpacked:
    reader = ArtifactReader(limits=limits) if limits else ArtifactReader()
    for start, end in pairwise([0, *sorted(cuts), len(data)]):
        reader.feed(memoryview(data)[start:end])
    return reader.finish()


def refused(data: bytes, cuts: Iterable[int] = (), limits: Limits | None = None) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        read(data, cuts, limits)
    assert caught.value.args[0].encode("utf-8"), "a message has to travel to the parent"
    return caught.value


def outcome(data: bytes, cuts: Iterable[int] = (), limits: Limits | None = None) -> object:
    """Return the model, or which error: all that a caller can see."""
    try:
        return read(data, cuts, limits)
    except ArtifactError as error:
        return error.kind, str(error), error.facts


# A1: the model is found by its content.


@pytest.mark.parametrize("form", ["ubj", "json"])
@pytest.mark.parametrize("container", ["raw", "tar", "tar.gz"])
def test_a_model_is_read_from_every_container(models: Models, form: str, container: str) -> None:
    """UBJSON and JSON come out byte for byte, raw, in a tar and in a gzip tar, whatever their names say."""
    model: bytes = getattr(models, form)
    data = model if container == "raw" else packed(member("xgboost-model", model), mode=container[4:])
    name = None if container == "raw" else "xgboost-model"
    unpacked = read(data)
    assert bytes(unpacked.data) == model
    assert unpacked[1:] == (form, container, name)


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_xgboost_loads_what_comes_out(models: Models, form: str) -> None:
    """The buffer is what XGBoost's parser takes, and the predictions are the same."""
    rows = xgb.DMatrix(np.eye(4, dtype=np.float32))
    unpacked = read(packed(member("model.bin", getattr(models, form))))
    loaded = xgb.Booster(model_file=bytearray(unpacked.data))
    np.testing.assert_array_equal(loaded.predict(rows), models.booster.predict(rows))


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["xgboost-model", "./xgboost-model", "a" * 90 + "/" + "b" * 60 + ".ubj"])
def test_every_tar_layout_is_read(models: Models, layout: int, name: str) -> None:
    """Ustar prefixes, GNU long names and pax paths give the member its name."""
    data = packed(member("./", type=tarfile.DIRTYPE), member(name, models.ubj), layout=layout)
    unpacked = read(data)
    assert unpacked.data == models.ubj
    assert unpacked.member == name.removeprefix("./")


def test_a_tar_older_than_ustar_is_read(models: Models) -> None:
    """Headers without a magic are told by their checksum."""
    data = block_with(packed(member("xgboost-model", models.ubj), mode=""), 257, bytes(8))
    assert read(data).data == models.ubj


def test_gnu_times_are_no_prefix(models: Models) -> None:
    """GNU tar keeps access times where POSIX keeps the start of the name."""
    plain = packed(member("xgboost-model", models.ubj), layout=tarfile.GNU_FORMAT, mode="")
    assert read(block_with(plain, 345, b"14654321011\0")).member == "xgboost-model"


def test_pax_attributes_are_skipped(models: Models) -> None:
    """Headers for all members, and attributes such as macOS adds, describe and do not disturb."""
    headers = {"LIBARCHIVE.xattr.com.apple.quarantine": "MDA4", "comment": "züge = 1\n"}
    info, data = member("xgboost-model", models.ubj, pax_headers=headers)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", pax_headers={"comment": "abc"}) as tar:
        tar.addfile(info, io.BytesIO(data))
    assert read(file.getvalue()).data == models.ubj


def test_a_size_in_base_256_or_pax_counts(models: Models) -> None:
    """A size may be stated in GNU's base 256, and in a pax header that overrules the header's own."""
    plain = packed(member("xgboost-model", models.ubj), mode="")
    large = block_with(plain, 124, b"\x80" + len(models.ubj).to_bytes(11, "big"))
    assert read(large).data == models.ubj
    info, data = member("xgboost-model", models.ubj, pax_headers={"size": str(len(models.ubj))})
    both = packed((info, data), mode="")
    assert read(both[:1024] + block_with(both[1024:], 124, b"0" * 11 + b"\0")).data == models.ubj


OTHER = b"other"
CHOICES: dict[str, tuple[list[str], str | None]] = {
    "xgboost-model first": (["xgboost-model", "metrics.json"], "xgboost-model"),
    "xgboost-model last": (["metrics.json", "model.ubj", "README.txt", "xgboost-model"], "xgboost-model"),
    "xgboost-model between": (["a.json", "xgboost-model", "b.ubj"], "xgboost-model"),
    "one suffix": (["README.txt", "model.ubj", "code/inference.py"], "model.ubj"),
    "one suffix, deep and in capitals": (["export/1/MODEL.JSON"], "export/1/MODEL.JSON"),
    "AppleDouble": (["._model.ubj", "model.ubj", "deep/._model.json"], "model.ubj"),
    "two suffixes": (["model.ubj", "README.txt", "metrics.json"], None),
    "one path twice": (["model.ubj", "./model.ubj"], None),
    "xgboost-model too deep": (["export/xgboost-model"], None),
    "no suffix": (["model", "README.txt"], None),
    "only AppleDouble": (["._xgboost-model", "._model.ubj"], None),
    "nothing": ([], None),
}


@pytest.mark.parametrize(("names", "chosen"), CHOICES.values(), ids=CHOICES)
def test_the_member_that_is_the_model(models: Models, names: list[str], chosen: str | None) -> None:
    """xgboost-model wins wherever it stands, else the only model suffix does, else the members are listed."""
    data = packed(*(member(name, models.ubj if name == chosen else OTHER) for name in names))
    if chosen:
        unpacked = read(data)
        assert unpacked.data == models.ubj
        assert unpacked.member == chosen
    else:
        error = refused(data)
        assert error.kind == "unsupported"
        assert error.facts["members"] == [name.removeprefix("./") for name in names]
        assert all(repr(name.removeprefix("./")) in str(error) for name in names)


def test_a_directory_is_no_model(models: Models) -> None:
    """A directory that has the model's name is listed, and its contents do not stand in for it."""
    folder = member("xgboost-model", type=tarfile.DIRTYPE)
    assert "'xgboost-model'" in str(refused(packed(folder, member("xgboost-model/data", models.ubj))))


def test_two_xgboost_models_are_ambiguous(models: Models) -> None:
    """Readers disagree on which of two members of one name counts, so neither does."""
    error = refused(packed(member("xgboost-model", models.ubj), member("./xgboost-model", models.json)))
    assert (error.kind, "two members" in str(error)) == ("unsupported", True)


def test_a_long_list_of_members_is_cut() -> None:
    """A message stays readable and sendable, however many and long the names are."""
    error = refused(packed(*(member(f"{number}" + "é" * 4000) for number in range(40))))
    assert len(str(error)) < 3000
    assert "..." in str(error)


@pytest.mark.parametrize("space", [b"", b" ", b"\n  ", b"\t", b"\r\n", b" " * 2000], ids=repr)
def test_json_with_white_space_is_told_as_xgboost_does(models: Models, space: bytes) -> None:
    """White space after '{' and after the model is JSON for XGBoost, and for us."""
    data = b"{" + space + models.json[1:] + space
    xgb.Booster(model_file=bytearray(data))
    assert read(data).format == "json"


@pytest.mark.parametrize("before", [b" ", b"\n", b"\xef\xbb\xbf"], ids=repr)
@pytest.mark.parametrize("form", ["ubj", "json"])
def test_what_comes_before_a_model_is_refused_as_xgboost_does(models: Models, before: bytes, form: str) -> None:
    """A model starts with its '{': white space or a byte order mark before it is refused here and there."""
    data = before + getattr(models, form)
    with pytest.raises(xgb.core.XGBoostError, match="Invalid model format"):
        xgb.Booster(model_file=bytearray(data))
    assert refused(data).kind == "corrupt"


# A2: what is refused, and how it is named.


class Trap:
    """A pickle that leaves a file behind if anybody opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


WRAPPINGS: dict[str, Callable[[bytes], bytes]] = {
    "raw": lambda data: data,
    "gzip": gzip.compress,
    "xgboost-model in tar.gz": lambda data: packed(member("xgboost-model", data)),
    "xgboost-model in tar": lambda data: packed(member("xgboost-model", data), mode=""),
    "suffix in tar.gz": lambda data: packed(member("model.bin", data)),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_named_and_never_opened(
    models: Models, tmp_path: Path, protocol: int, wrap: Callable[[bytes], bytes]
) -> None:
    """Pickles of every protocol, of a booster or in a container, are refused with the way to save anew."""
    trap = Trap(tmp_path / "sprung")
    for value in (models.booster, trap, [trap], {"model": trap}, (1, trap)):
        error = refused(wrap(pickle.dumps(value, protocol)))
        assert error.kind == "unsupported"
        assert "Python pickle" in str(error)
        assert "save_model('model.ubj')" in str(error)
    assert not trap.path.exists()


def legacy(*, start: bytes = b"binf", version: tuple[int, int] | None = None) -> bytes:
    fields = bytearray(LEGACY[4:])
    if version:
        fields[20:28] = b"".join(word.to_bytes(4, "little") for word in version)
    return start + bytes(fields)


LEGACIES = {
    "2.1": (legacy(), "XGBoost 2.1"),
    "0.90": (legacy(version=(0, 0)), "XGBoost before 1.0"),
    "1.7 without binf": (legacy(start=b"", version=(1, 7)), "XGBoost 1.7"),
    "in a pickle of 1.0": (
        legacy(start=b"CONFIG-offset:" + bytes(8) + b"binf", version=(1, 0)),
        "XGBoost 1.0",
    ),
    "base 64": (b"bs64\tAAAA", "XGBoost before 3.1"),
    "cut short": (LEGACY[:100], "XGBoost before 3.1"),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
@pytest.mark.parametrize(("data", "writer"), LEGACIES.values(), ids=LEGACIES)
def test_the_legacy_binary_names_who_wrote_it(data: bytes, writer: str, wrap: Callable[[bytes], bytes]) -> None:
    """The format that XGBoost 3.1 dropped is refused with its writer and the way to convert it."""
    error = refused(wrap(data))
    assert (error.kind, error.facts["writer"]) == ("unsupported", writer)
    assert f"written by {writer};" in str(error)
    assert "xgboost>=1.6,<3.1" in str(error)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xgboost-model", "x")
    return file.getvalue()


FOREIGN: dict[str, tuple[bytes, str, str]] = {
    "zip": (zipped(), "unsupported", "zip archive"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "unsupported", "zip archive"),
    "bzip2": (bz2.compress(b"x"), "unsupported", "bzip2"),
    "xz": (lzma.compress(b"x"), "unsupported", "xz"),
    "zlib": (zlib.compress(pickle.dumps([1])), "unsupported", "joblib"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"x")), "unsupported", "gzip once more"),
    "LightGBM": (b"tree\nversion=v4\nnum_class=1\n", "unsupported", "LightGBM"),
    "CatBoost": (b"CBM1\x10\x00\x00", "unsupported", "CatBoost"),
    "ONNX": (b"\x08\x09\x12\x0eOnnxMLTools", "unsupported", "ONNX"),
    "HTML": (b"\r\n<!DOCTYPE HTML><html><body>403", "corrupt", "HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "corrupt", "XML"),
    "text": (b"404: Not Found", "corrupt", "b'404: Not Found'"),
    "zeros": (bytes(4096), "corrupt", "neither an XGBoost model nor a tar"),
    "empty": (b"", "corrupt", "is empty"),
    "gzip of nothing": (gzip.compress(b""), "corrupt", "is empty"),
    "tar of nothing": (gzip.compress(bytes(10240)), "unsupported", "members are: none"),
    "empty member": (packed(member("xgboost-model")), "corrupt", "member 'xgboost-model' is empty"),
    "empty JSON": (b"{}", "corrupt", "neither an XGBoost model"),
    "other JSON": (b'{"error": "not found"}', "corrupt", "'learner'"),
    "other UBJSON": (b"{L" + bytes(7) + b"\x01ai\x01}", "corrupt", "'learner'"),
}


@pytest.mark.parametrize(("data", "kind", "words"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_model_is_named(data: bytes, kind: str, words: str) -> None:
    """Formats that people do upload, and pages that stores do return, are called by their names."""
    error = refused(data)
    assert error.kind == kind
    assert words in str(error)


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_gzip_of_a_bare_model_is_named(models: Models, form: str) -> None:
    """Gzip has to contain a tar."""
    assert "gzip of a bare file" in str(refused(gzip.compress(getattr(models, form))))


def test_a_memory_snapshot_is_named(models: Models) -> None:
    """What is inside a booster's pickle starts like a model, but XGBoost does not find the model in it."""
    snapshot = bytes(models.booster.__getstate__()["handle"])
    assert "snapshot of a Booster" in str(refused(snapshot))
    assert "snapshot of a Booster" in str(refused(json.dumps({"Config": {}, "Model": {}}).encode()))


TYPES = {
    "hard link": (tarfile.LNKTYPE, "unsafe"),
    "symbolic link": (tarfile.SYMTYPE, "unsafe"),
    "character device": (tarfile.CHRTYPE, "unsafe"),
    "block device": (tarfile.BLKTYPE, "unsafe"),
    "fifo": (tarfile.FIFOTYPE, "unsafe"),
    "sparse": (tarfile.GNUTYPE_SPARSE, "unsupported"),
    "type 'V'": (b"V", "unsupported"),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, (_, kind) in TYPES.items()])
def test_only_files_and_directories_may_be_in_a_tar(models: Models, name: str, kind: str) -> None:
    """Links, devices, fifos and sparse files are refused beside a good model too."""
    odd = member("odd", type=TYPES[name][0], linkname="xgboost-model" + "x" * 200)
    model = member("xgboost-model", models.ubj)
    for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        for members in ((odd, model), (model, odd)):
            error = refused(packed(*members, layout=layout))
            assert (error.kind, error.facts["member"]) == (kind, "odd")
            assert name in str(error)


def test_a_sparse_file_announced_by_pax_is_refused(models: Models) -> None:
    """GNU tar writes sparse files as regular ones with pax records."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "xgboost-model"}
    error = refused(packed(member("xgboost-model", models.ubj, pax_headers=headers)))
    assert (error.kind, "sparse" in str(error)) == ("unsupported", True)


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name",
    ["/xgboost-model", "../xgboost-model", "a/../../b", "a/..", "//x", "x/" * 80 + "../y", "/é" * 99],
    ids=range(7),
)
def test_names_stay_inside(models: Models, layout: int, name: str) -> None:
    """Absolute names and '..' are refused, whichever header states them."""
    info, _ = member(name)
    error = refused(packed((info, b""), member("xgboost-model", models.ubj), layout=layout))
    assert (error.kind, "points outside" in str(error)) == ("unsafe", True)


def test_odd_names_can_be_shown() -> None:
    """Names that are no UTF-8, or hold control characters, end up readable in a message."""
    data = block_with(packed(member("a.txt"), mode=""), 0, b"\xff\n\xc3")
    assert r"\\xff\n\\xc3xt" in str(refused(data))


def model_tar(**fields: object) -> bytes:
    return packed(member("xgboost-model", trained().ubj, **fields), mode="")


def spread(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at:]


def extension(flag: bytes, body: bytes) -> bytes:
    """Build an extension header by itself, for those that tarfile would not write."""
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = flag, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def gzipped() -> bytes:
    return gzip.compress(model_tar())


def pax(body: bytes, flag: bytes = b"x") -> bytes:
    return extension(flag, body) + model_tar()


def with_field(at: int, field: bytes, *, sign: bool = True) -> bytes:
    return block_with(model_tar(), at, field, sign=sign)


DAMAGE: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "wrong checksum": (lambda: with_field(0, b"y", sign=False), "corrupt", "header at byte 0"),
    "checksum in words": (lambda: with_field(148, b"8" * 8, sign=False), "corrupt", "header at byte 0"),
    "wrong second header": (lambda: pax(b"6 a=b\n").replace(b"xgboost-", b"y"), "corrupt", "at byte 1024"),
    "size in words": (lambda: with_field(124, b"99 apples   "), "corrupt", "states a size"),
    "negative size": (lambda: with_field(124, b"\xff" * 12), "corrupt", "states a size"),
    "absurd size": (lambda: with_field(124, b"\x80" + b"\x7f" * 11), "unsafe", "unpacks to more"),
    "absurd pax size": (lambda: pax(b"29 size=99999999999999999999\n"), "unsafe", "unpacks to more"),
    "pax size in words": (lambda: pax(b"12 size=two\n"), "corrupt", "'two'"),
    "pax size too long": (lambda: pax(b"49 size=" + b"9" * 40 + b"\n"), "corrupt", "'9999"),
    "pax length zero": (lambda: pax(b"0 a=b\n"), "corrupt", "pax"),
    "pax length zero later": (lambda: pax(b"6 a=b\n0 a=b\n"), "corrupt", "pax"),
    "pax length too long": (lambda: pax(b"99 a=b\n"), "corrupt", "pax"),
    "pax length wrong": (lambda: pax(b"5 a=b\n"), "corrupt", "pax"),
    "pax without records": (lambda: pax(b"hello"), "corrupt", "pax"),
    "pax name for all": (lambda: pax(b"10 path=a\n", b"g"), "unsupported", "all its members"),
    "huge pax": (lambda: pax(b"1" * (1 << 19)), "unsafe", "describing one member"),
    "endless pax": (lambda: extension(b"g", b"8 a=bcd\n") * 9, "unsafe", "describing one member"),
    "directory with a size": (lambda: with_field(156, b"5"), "corrupt", "has a size"),
    "file/ with a size": (lambda: packed(member("a.ubj/", b"x"), mode=""), "corrupt", "has a size"),
    "no end marker": (lambda: model_tar().rstrip(b"\0") + bytes(100), "corrupt", "cut short"),
    "after the tar": (lambda: model_tar() + b"x", "corrupt", "followed by other bytes"),
    "tar after tar": (lambda: model_tar() * 2, "corrupt", "followed by other bytes"),
    "after the gzip": (lambda: gzipped() + b"\0x", "corrupt", "belong to no gzip"),
    "after the gzip, like gzip": (lambda: gzipped() + b"\x1fx", "corrupt", "damaged"),
    "wrong CRC": (lambda: gzipped()[:-8] + b"1234" + gzipped()[-4:], "corrupt", "data check"),
    "wrong length": (lambda: gzipped()[:-4] + b"1234", "corrupt", "length check"),
    "after UBJSON": (lambda: trained().ubj + b"\0", "corrupt", "does not end like a model"),
    "after JSON": (lambda: trained().json + b"\nx", "corrupt", "does not end like a model"),
    "after a member": (lambda: packed(member("a.ubj", trained().ubj + b"x")), "corrupt", "does not end"),
    "UBJSON cut short": (lambda: trained().ubj[:-1], "corrupt", "does not end like a model"),
    "JSON cut short": (lambda: trained().json[:-9], "corrupt", "does not end like a model"),
}


@pytest.mark.parametrize(("make", "kind", "words"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_told(make: Callable[[], bytes], kind: str, words: str) -> None:
    """Wrong checksums, sizes and lengths, and bytes where none may be, are errors, plain and inside gzip."""
    data = make()
    for form in (data, gzip.compress(data)) if data[257:262] == b"ustar" else (data,):
        error = refused(form)
        assert (error.kind, words in str(error)) == (kind, True), str(error)


@pytest.mark.parametrize("mode", ["", "gz"])
def test_every_truncation_is_found(models: Models, mode: str) -> None:
    """An archive that lacks any of its bytes, down to its end marker, is refused."""
    whole = packed(member("README.txt", b"hello"), member("xgboost-model", models.ubj), mode=mode)
    needed = len(whole) if mode else len(whole.rstrip(b"\0")) // 512 * 512 + 1024
    for length in range(0, needed, 1 if mode else 7):
        assert refused(whole[:length]).kind == "corrupt"


def test_zeros_after_the_end_are_padding(models: Models) -> None:
    """Tapes and block devices fill up with zeros, after the tar as after the gzip."""
    plain = packed(member("xgboost-model", models.ubj), mode="")
    for data in (plain + bytes(999), gzip.compress(plain) + bytes(70_000), gzip.compress(plain + bytes(999))):
        assert read(data).data == models.ubj


def test_gzip_may_have_many_members(models: Models) -> None:
    """Pigz and bgzip write the data as several gzip members, empty ones among them."""
    plain = packed(member("xgboost-model", models.ubj), mode="")
    parts = [plain[:100], b"", plain[100:1500], plain[1500:]]
    assert read(b"".join(map(gzip.compress, parts))).data == models.ubj
    assert read(b"\0".join(map(gzip.compress, parts))).data == models.ubj


# A2: caps.


def test_no_more_members_than_the_cap(models: Models) -> None:
    """The cap counts members of every type, and is exact."""
    folders = [member(f"d{number}", type=tarfile.DIRTYPE) for number in range(63)]
    model = member("xgboost-model", models.ubj)
    assert read(packed(*folders, model)).data == models.ubj
    error = refused(packed(*folders, model, member("x")))
    assert (error.kind, error.facts["limit"]) == ("unsafe", 64)


@pytest.mark.parametrize("mode", ["raw", "", "gz"])
def test_no_more_bytes_than_the_cap(models: Models, mode: str) -> None:
    """The cap counts everything that is unpacked, and is exact."""
    plain = packed(member("xgboost-model", models.ubj), member("README.txt", b"x" * 5000), mode="")
    size = len(models.ubj) if mode == "raw" else len(plain)
    data = {"raw": models.ubj, "": plain, "gz": gzip.compress(plain)}[mode]
    assert read(data, limits=Limits(max_unpacked=size)).data == models.ubj
    error = refused(data, limits=Limits(max_unpacked=size - 1))
    assert (error.kind, error.facts["limit"]) == ("unsafe", size - 1)


BOMBS = {
    "model": lambda: packed(member("xgboost-model", b"{" + bytes(32 << 20))),
    "beside the model": lambda: packed(member("xgboost-model", trained().ubj), member("x", bytes(32 << 20))),
    "padding": lambda: gzip.compress(packed(member("xgboost-model", trained().ubj), mode="") + bytes(32 << 20)),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_a_decompression_bomb_is_stopped_early(make: Callable[[], bytes]) -> None:
    """Whatever expands far beyond its size is refused before it has, wherever it hides."""
    data = make()
    reader = ArtifactReader()
    with pytest.raises(ArtifactError, match="decompression bombs") as caught:
        reader.feed(data[: len(data) * 3 // 4])
    assert (caught.value.kind, caught.value.facts["limit"]) == ("unsafe", 200)
    assert outcome(data, range(1, len(data), 1000)) == outcome(data)


def test_a_passage_that_shrinks_far_is_no_bomb(models: Models) -> None:
    """The ratio is that of whole steps of the input: chunks that end in the passage do not matter."""
    mixed = bytes(2_500_000) + np.random.default_rng(7).bytes(60_000)
    data = packed(member("mixed", mixed), member("xgboost-model", models.ubj))
    assert read(data, range(1, len(data), 100)).data == models.ubj


def test_the_first_fault_is_told(models: Models) -> None:
    """Bytes beyond the cap are not looked at, so that the error is the same however the bytes are cut."""
    plain = packed(member("xgboost-model", models.ubj), mode="")
    limits = Limits(max_unpacked=len(plain) + 10)
    for data in (plain + bytes(20) + b"x", gzip.compress(plain + bytes(20) + b"x")):
        assert refused(data, limits=limits).kind == "unsafe"
        assert refused(data, range(1, len(data)), limits).kind == "unsafe"


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that Python held at once while working."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_lies_costs_nothing(models: Models) -> None:
    """Memory is taken for bytes that have come, not for bytes that were announced."""
    liar = block_with(packed(member("xgboost-model", models.ubj), mode=""), 124, b"27777777777\0")
    reader = ArtifactReader()
    assert peak_of(lambda: reader.feed(liar)) < 100_000
    assert reader.declared == 0o27777777777


def test_skipped_members_and_rivals_are_not_kept(models: Models) -> None:
    """Members that cannot be the model pass through, and rivals are dropped when there are two."""
    filler = np.random.default_rng(7).bytes(2 << 20)
    names = ["README.txt", "a.json", "b.json", "c.json", "xgboost-model", "d.json"]
    data = packed(*(member(name, models.ubj if name == "xgboost-model" else filler) for name in names))
    assert peak_of(lambda: read(data)) < 3 << 20


# The stream.


def test_declared_is_known_early(models: Models) -> None:
    """The size of the model is known from its header on; of a raw one, what has come."""
    plain = packed(member("README.txt", b"x" * 600), member("xgboost-model", models.ubj), mode="")
    reader = ArtifactReader()
    assert reader.declared == 0
    reader.feed(plain[:1600])
    assert reader.declared == 0
    reader.feed(plain[1600:2048])
    assert reader.declared == len(models.ubj)
    raw = ArtifactReader()
    raw.feed(models.ubj[:1000])
    assert raw.declared == 1000


def test_declared_is_exact_before_the_end(models: Models) -> None:
    """Nothing that was fed is held back: before finish() the size is known, of the smallest archive too."""
    tiny = packed(member("xgboost-model", b'{"learner":{}}'))
    for data, size in (
        (packed(member("a.ubj", models.ubj)), len(models.ubj)),
        (tiny, 14),
        (models.json, None),
    ):
        reader = ArtifactReader()
        reader.feed(data)
        assert reader.declared == (size or len(data)) == len(reader.finish().data)


def test_nothing_stays_inside_zlib(models: Models) -> None:
    """All that a prefix of the input expands to has been looked at when feed returns."""
    data = packed(member("zeros", bytes(300_000)), member("xgboost-model", models.ubj))
    for length in range(2, len(data)):
        reader = ArtifactReader()
        reader.feed(data[:length])
        assert isinstance(reader._stage, archive.Gunzip)
        assert reader._stage._made == len(zlib.decompressobj(31).decompress(data[:length]))


def test_a_refused_member_is_not_waited_for() -> None:
    """A large xgboost-model that is a pickle is refused at its first block."""
    data = packed(member("xgboost-model", b"\x80\x04" + bytes(1 << 20)), mode="")
    with pytest.raises(ArtifactError, match="Python pickle"):
        ArtifactReader().feed(data[:1024])


def test_the_module_is_light() -> None:
    """The worker starts fast: no asyncio, no tarfile, no numpy comes with the reader."""
    root = Path(archive.__file__).parents[1]
    script = (
        "import sys, types; package = sys.modules['modelcache'] = types.ModuleType('modelcache');"
        f"package.__path__ = [{str(root)!r}]; import modelcache.worker.artifact; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    heavy = {"asyncio", "tarfile", "pickle", "dataclasses", "numpy", "xgboost", "modelcache.registry"}
    assert not heavy & set(done.stdout.split())


# Properties.


def samples() -> list[bytes]:
    """Return good and bad artifacts that between them reach every branch."""
    models = trained()
    model = member("xgboost-model", models.ubj)
    good = [
        models.ubj,
        models.json,
        *(packed(model, mode=mode, layout=layout) for mode in ("", "gz") for layout in range(3)),
        packed(member("metrics.json", b"{}"), member("d/" * 120, type=tarfile.DIRTYPE), model),
        packed(member("é" * 80 + ".json", models.json), layout=tarfile.PAX_FORMAT, mode=""),
        packed(member("e" * 180 + ".json", models.json), layout=tarfile.GNU_FORMAT, mode=""),
        gzip.compress(packed(model, mode="")[:700]) + gzip.compress(packed(model, mode="")[700:]) + bytes(20),
    ]
    link = member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    noise = member("noise", np.random.default_rng(7).bytes(5000))
    # In one chunk zlib finds the wrong checksum before it gives out the link.
    link_then_damage = packed(noise, link)[:-8] + b"12345678"
    bad = [
        *(data for data, _, _ in FOREIGN.values()),
        *(make() for make, _, _ in DAMAGE.values()),
        *(data for data, _ in LEGACIES.values()),
        *(packed(member("xgboost-model", data), mode="") for data, _ in LEGACIES.values()),
        packed(link, model),
        link_then_damage,
        packed(member("xgboost-model", pickle.dumps(models.booster))),
    ]
    return good + bad


SAMPLES = st.deferred(lambda: st.sampled_from(samples()))
CUTS = st.lists(st.integers(0, 5000), max_size=20)
TIGHT = Limits(max_members=3, max_unpacked=9000, max_ratio=2)


@SETTINGS
@given(SAMPLES, CUTS, st.sampled_from([Limits(), TIGHT]))
def test_chunks_do_not_matter(data: bytes, cuts: list[int], limits: Limits) -> None:
    """The model, or the very error, is the same however the bytes are cut."""
    inside = [cut for cut in cuts if cut <= len(data)]
    assert outcome(data, inside, limits) == outcome(data, limits=limits)


def test_single_bytes_do_not_matter() -> None:
    """The same holds where every chunk is one byte."""
    for data in samples():
        if len(data) < 20_000:
            assert outcome(data, range(1, len(data))) == outcome(data)


@SETTINGS
@given(st.binary(max_size=2000), CUTS, st.sampled_from(sorted(WRAPPINGS)))
def test_any_bytes_are_a_model_or_an_error(noise: bytes, cuts: list[int], wrapping: str) -> None:
    """No bytes, raw or packed, raise anything but ArtifactError."""
    data = WRAPPINGS[wrapping](noise)
    outcome(data, [cut for cut in cuts if cut <= len(data)])


@SETTINGS
@given(st.binary(max_size=512), st.sampled_from(["", "gz"]), st.integers(0, 511))
def test_any_header_is_read_or_an_error(noise: bytes, mode: str, at: int) -> None:
    """No tar header whose checksum holds raises anything but ArtifactError."""
    data = block_with(packed(member("xgboost-model", trained().ubj), mode=""), at, noise[: 512 - at])
    outcome(gzip.compress(data) if mode else data)


EDITS: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "flip": lambda data, at, new: data[:at] + new[: len(data) - at] + data[at + len(new) :],
    "delete": lambda data, at, new: data[:at] + data[at + len(new) :],
    "insert": spread,
    "truncate": lambda data, at, new: data[:at],
}


@SETTINGS
@given(
    SAMPLES,
    st.lists(
        st.tuples(st.sampled_from(sorted(EDITS)), st.integers(0, 30_000), st.binary(min_size=1, max_size=40)),
        min_size=1,
        max_size=3,
    ),
    CUTS,
)
def test_any_damage_is_a_model_or_an_error(data: bytes, edits: list[tuple[str, int, bytes]], cuts: list[int]) -> None:
    """A damaged archive raises ArtifactError or nothing, and the same however it is cut."""
    for edit, at, new in edits:
        data = EDITS[edit](data, at % (len(data) + 1), new)
    assert outcome(data, [cut for cut in cuts if cut <= len(data)]) == outcome(data)


@SETTINGS
@given(st.integers(0, 30_000), st.binary(min_size=1, max_size=40), st.sampled_from(sorted(EDITS)))
def test_damaged_gzip_never_gives_another_model(at: int, new: bytes, edit: str) -> None:
    """What gets through gzip's checksum is the model that was packed."""
    data = packed(member("xgboost-model", trained().ubj))
    damaged = EDITS[edit](data, at % len(data), new)
    result = outcome(damaged)
    assert not isinstance(result, Unpacked) or result.data == trained().ubj


NAMES = st.one_of(
    st.sampled_from(["xgboost-model", "./xgboost-model", "model.ubj", "d/metrics.json", "README.txt", "d/"]),
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=150),
)


@SETTINGS
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_member_is_what_tarfile_reads(members: list[tuple[str, bytes]], layout: int) -> None:
    """The standard library finds the same bytes under the name of the chosen member."""
    models = trained()
    files = [
        member(name, b"" if name.endswith("/") else models.ubj + data + b"}", type=kind)
        for name, data in members
        for kind in (tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE,)
    ]
    data = packed(*files, layout=layout)
    result = outcome(data)
    if isinstance(result, Unpacked):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            same = [info for info in tar if info.isfile() and Path(info.name) == Path(result.member or "")]
            assert [tar.extractfile(info).read() for info in same] == [result.data]  # type: ignore[union-attr]
