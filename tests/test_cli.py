"""The command as people and scripts use it: what it prints, and its exit codes. 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from typer.testing import CliRunner

import modelcache
import zoo
from modelcache.cli import main
from modelcache.commands.app import app
from modelcache.commands.predicting import NamedRows, lines, read_table
from modelcache.errors import InvalidInputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder of four models of different kinds."""
    folder = tmp_path / "models"
    (folder / "tenant").mkdir(parents=True)
    (folder / "named.tar.gz").write_bytes(zoo.model(names=True).targz)
    (folder / "plain.ubj").write_bytes(zoo.model().ubj)
    (folder / "stopped.json").write_bytes(zoo.model("stopped", trees=30).json)
    (folder / "tenant" / "classes.ubj").write_bytes(zoo.model("multiclass").ubj)
    return folder


class Command:
    """What became of a command that was run."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_processes_left: None) -> Any:
    """Run the command in this process, as its entry point does."""

    def run(*arguments: object) -> Command:
        monkeypatch.setattr(sys, "argv", ["modelcache", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert isinstance(ended.value.code, int)
        return Command(ended.value.code, said.out, said.err)

    return run


def spawn(*command: object, **options: Any) -> Command:
    """Run the command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        check=False, capture_output=True, text=True, encoding="utf-8", timeout=60, env=environment, **options,
    )  # fmt: skip
    return Command(done.returncode, done.stdout, done.stderr)


def csv_of(rows: np.ndarray[Any, Any], header: str = "") -> str:
    cells = [["" if np.isnan(value) else repr(float(value)) for value in row] for row in rows]
    return "".join(line + "\n" for line in [header, *map(",".join, cells)] if line)


# The command itself


def test_without_arguments_it_shows_help(run: Any) -> None:
    """Nothing to do is no error: the help says what there is."""
    shown = run()
    assert shown.code == 0
    assert all(command in shown.out for command in ("demo", "predict", "inspect", "manifest", "--version"))


def test_version(run: Any) -> None:
    """``--version`` prints one line."""
    shown = run("--version")
    assert (shown.code, shown.out) == (0, f"modelcache {modelcache.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["predict"],
        ["predict", "models", "Chicago_IL"],
        ["predict", "models", "Chicago_IL", "no-such-file.csv"],
        ["predict", "models", "Chicago_IL", "-", "--output", "nonsense"],
        ["inspect"],
        ["inspect", "models", "--limit", "0"],
        ["manifest"],
        ["demo", "--models", "0"],
        ["demo", "--calls", "x"],
        ["demo", "--seed", "-1"],
    ],
)
def test_a_wrong_command_line_exits_with_2(run: Any, arguments: list[str]) -> None:
    """Wrong usage: exit code 2, the reason on standard error, nothing on standard output."""
    refused = run(*arguments)
    assert refused.code == 2
    assert refused.out == ""
    assert "Usage: modelcache" in refused.err


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(missing: str) -> None:
    """An installation without the extra answers with the command that adds it, not with a traceback."""
    blocked = f"import sys; sys.modules[{missing!r}] = None; from modelcache.cli import main; main()"
    refused = spawn("-c", blocked)
    assert refused.code == 1
    assert refused.out == ""
    assert re.fullmatch(rf"modelcache: .*{missing}.*pip install 'modelcache\[demo\]'.*\n", refused.err)


@pytest.mark.parametrize("missing", ["matplotlib", "xgboost"])
def test_without_its_extra_the_demo_says_what_to_install(missing: str, tmp_path: Path) -> None:
    """The demo needs more than the other commands, says so, and has not begun."""
    block = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = ['demo']"
    refused = spawn("-c", f"{block}; from modelcache.cli import main; main()", cwd=tmp_path)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == f"modelcache: The command demo needs {missing}: pip install 'modelcache[demo]'\n"
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_its_own_is_not_hidden() -> None:
    """Only what the user can act on becomes one line: a bug keeps its traceback."""
    broken = "import sys; sys.modules['modelcache.commands.predicting'] = None; from modelcache.cli import main; main()"
    failed = spawn("-c", broken)
    assert failed.code == 1
    assert "Traceback" in failed.err


def test_as_a_module_in_a_process_of_its_own(store: Path) -> None:
    """``python -m modelcache`` is the command; a pipe gets plain text on standard output, in whole lines."""
    rows = zoo.rows(3)
    done = spawn("-m", "modelcache", "predict", store, "plain", "-", input=csv_of(rows))
    assert (done.code, done.err) == (0, "")
    assert [np.float32(line) for line in done.out.splitlines()] == list(zoo.model().expected(rows))


def test_an_error_in_a_process_of_its_own(store: Path) -> None:
    """What fails ends with 1 and one line on standard error, without a traceback."""
    done = spawn("-m", "modelcache", "predict", store, "Nobody_XX", "-", input="1\n")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("modelcache: There is no model 'Nobody_XX'")
    assert done.err.count("\n") == 1


# predict


def test_predict_reads_a_file(run: Any, store: Path, tmp_path: Path) -> None:
    """One prediction a line, with all the digits a float32 has; an empty cell is a missing value."""
    rows = zoo.rows(40)
    assert np.isnan(rows).any()
    (tmp_path / "rows.csv").write_text(csv_of(rows))
    done = run("predict", store, "plain", tmp_path / "rows.csv")
    assert done.code == 0
    assert [np.float32(line) for line in done.out.splitlines()] == list(zoo.model().expected(rows))


def test_predict_matches_columns_by_name(run: Any, store: Path, tmp_path: Path) -> None:
    """With a header the order of the columns is free: they are put into the model's."""
    rows, order = zoo.rows(5), [3, 1, 0, 5, 4, 2]
    header = ",".join(zoo.FEATURES[place] for place in order)
    (tmp_path / "rows.csv").write_text("\ufeff" + csv_of(rows[:, order], header))
    done = run("predict", store, "named", tmp_path / "rows.csv")
    expected = zoo.model(names=True).expected(rows)
    assert [np.float32(line) for line in done.out.splitlines()] == list(expected)


def test_predict_checks_the_names(run: Any, store: Path, tmp_path: Path) -> None:
    """A header that is not the model's is refused: the numbers would be wrong."""
    header = ",".join(("f_x", *zoo.FEATURES[1:]))
    (tmp_path / "rows.csv").write_text(csv_of(zoo.rows(1), header))
    refused = run("predict", store, "named", tmp_path / "rows.csv")
    assert (refused.code, refused.out) == (1, "")
    assert re.fullmatch(r"modelcache: .*'named'.*missing: 'f_a'; unexpected: 'f_x'.*\n", refused.err)


@pytest.mark.parametrize(
    ("output", "options"),
    [
        ("value", {}),
        ("margin", {"output_margin": True}),
        ("leaf", {"pred_leaf": True}),
        ("contribs", {"pred_contribs": True}),
    ],
)
def test_predict_several_outputs(run: Any, store: Path, tmp_path: Path, output: str, options: dict[str, Any]) -> None:
    """Several numbers for a row are one line, separated by commas; a leaf is a whole number."""
    rows = zoo.rows(4)
    (tmp_path / "rows.csv").write_text(csv_of(rows))
    done = run("predict", store, "tenant/classes", tmp_path / "rows.csv", "--output", output)
    printed = [[np.float32(cell) for cell in line.split(",")] for line in done.out.splitlines()]
    expected = zoo.model("multiclass").expected(rows, **options)
    assert np.array_equal(printed, expected.reshape(len(rows), -1))
    assert ("." in done.out) == (output != "leaf")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,2\n3,x\n", r"Line 2, column 2: 'x' is no number\."),
        ("1,2\n\n3,1_000\n", r"Line 3, column 2: '1_000' is no number\."),
        ("a,b\n1,2\nc,d\n", r"Line 3, column 1: 'c' is no number\."),
        ("1,2\n3\n", r"Line 2 has 1 cells, the first has 2\."),
        ("", r"There are no rows"),
        ("a,b\n", r"There are no rows"),
        ("1," + "9" * 200_000, r"Line 1: field larger than field limit"),
    ],
)
def test_a_bad_csv_names_the_line(text: str, complaint: str) -> None:
    """Whoever has a file of a million lines is told which one is wrong."""
    with pytest.raises(InvalidInputError, match=f"^{complaint}"):
        read_table(text.splitlines(keepends=True))


def test_bytes_that_are_no_text(run: Any, store: Path, tmp_path: Path) -> None:
    """A file that is no CSV at all is refused in one line."""
    (tmp_path / "rows.csv").write_bytes(b"\xff\xfe\x00")
    refused = run("predict", store, "plain", tmp_path / "rows.csv")
    assert refused.code == 1
    assert re.fullmatch(r"modelcache: .*rows\.csv is not UTF-8 text.*\n", refused.err)


def test_a_csv_without_a_header_has_no_names() -> None:
    """A first line of numbers and empty cells is a row; spaces and quotes around numbers do not matter."""
    table = read_table(['1, 2 ,"3"\n', ",,\n", "nan,-1e3,inf\n"])
    assert isinstance(table, np.ndarray)
    expected = np.array([[1, 2, 3], [np.nan] * 3, [np.nan, -1000, np.inf]])
    assert np.array_equal(table, expected, equal_nan=True)


def test_a_header_is_a_first_line_with_a_cell_that_is_no_number() -> None:
    """One name is enough to tell."""
    table = read_table(["YEAR, 2\n", "1,2\n"])
    assert isinstance(table, NamedRows)
    assert table.columns == ("YEAR", "2")


def test_numbers_are_printed_as_short_as_float32_allows() -> None:
    """0.1 is printed as 0.1, not as the double next to it."""
    values = np.array([0.1, 1e20, -3], np.float32)
    assert list(lines(values, "value")) == ["0.1", "1e+20", "-3.0"]


# inspect


def test_inspect_a_store(run: Any, store: Path) -> None:
    """Each model is a line: its form, sizes, features, trees and best iteration."""
    shown = run("inspect", store)
    assert shown.code == 0
    stopped = zoo.model("stopped", trees=30).booster
    listed = {words[0]: words[1:] for line in shown.out.splitlines() if (words := line.split())}
    assert listed["name"] == ["packed", "format", "artifact", "memory", "features", "trees", "best"]
    assert [listed["named"][place] for place in (0, 1, -3, -2, -1)] == ["tar.gz", "UBJSON", "6", "5", "-"]
    assert [listed["stopped"][place] for place in (0, 1, -3)] == ["raw", "JSON", "6"]
    assert listed["stopped"][-2:] == [str(stopped.num_boosted_rounds()), str(stopped.best_iteration)]
    assert listed["tenant/classes"][-2] == "15"
    assert shown.out.endswith(f"\n4 models in {store}.\n")


def test_inspect_goes_on_after_a_broken_artifact(run: Any, store: Path) -> None:
    """What cannot be loaded is a line like the others, with its reason below, and exit code 1."""
    (store / "broken.tar.gz").write_bytes(zoo.model().targz[:500])
    shown = run("inspect", store)
    assert shown.code == 1
    assert re.search(r"^broken +broken *$", shown.out, re.MULTILINE)
    assert re.search(r"^plain +raw ", shown.out, re.MULTILINE)
    assert re.search(r"^broken: CorruptArtifactError\n  the gzip data is cut short", shown.out, re.MULTILINE)
    assert shown.out.endswith(f"\n5 models, 1 of them broken, in {store}.\n")


def test_inspect_lists_at_most_the_limit(run: Any, store: Path) -> None:
    """A store of a million models is not loaded by a look at it."""
    shown = run("inspect", store, "--limit", 2)
    assert "named" in shown.out
    assert "stopped" not in shown.out
    assert shown.out.endswith(f"2 models in {store}. There are more: raise --limit to see them.\n")
    assert run("inspect", store, "--limit", 4).out.endswith(f"4 models in {store}.\n")


def test_inspect_names_in_a_pipe_are_not_folded(run: Any, store: Path) -> None:
    """What is no terminal gets each model on one line, however long its name."""
    name = "n" * 150
    (store / f"{name}.ubj").write_bytes(zoo.model().ubj)
    assert re.search(rf"^{name} +raw ", run("inspect", store).out, re.MULTILINE)


def test_inspect_takes_names_literally(run: Any, store: Path) -> None:
    """A name in square brackets is no instruction to the terminal."""
    (store / "[red]x.ubj").write_bytes(b"broken")
    shown = run("inspect", store)
    assert len(re.findall(r"^\[red\]x", shown.out, re.MULTILINE)) == 2


def test_inspect_an_empty_store(run: Any, tmp_path: Path) -> None:
    """Nothing there is no error."""
    shown = run("inspect", tmp_path)
    assert (shown.code, shown.out.strip()) == (0, f"No models in {tmp_path}.")


def test_inspect_a_store_that_is_not_there(run: Any, tmp_path: Path) -> None:
    """A wrong path is an error, not an empty store."""
    refused = run("inspect", tmp_path / "nowhere")
    assert (refused.code, refused.out) == (1, "")
    assert re.fullmatch(r"modelcache: .*nowhere.*\n", refused.err)


@pytest.mark.parametrize("place", ["named", "named.tar.gz"])
def test_inspect_a_model(run: Any, store: Path, place: str) -> None:
    """All facts of one model, its features by name; the file can be given instead of store and name."""
    shown = run("inspect", store, place) if place == "named" else run("inspect", store / place)
    assert shown.code == 0
    facts = dict(re.findall(r"^(\w+(?: \w+)*) {2,}(\S.*)$", shown.out, re.MULTILINE))
    artifact = len(zoo.model(names=True).targz)
    assert (
        facts.items()
        >= {
            "name": place,
            "packed": "tar.gz",
            "format": "UBJSON",
            "booster": "gbtree",
            "objective": "reg:squarederror",
            "trees": "5",
            "best iteration": "-",
            "outputs": "1",
            "features": "6",
        }.items()
    )
    assert facts["artifact"].endswith(f"({artifact:,} bytes)")
    assert re.fullmatch(r"[\d.]+ KiB \([\d,]+ bytes\)", facts["in memory"])
    assert facts["version"]
    assert shown.out.endswith(" " * 16 + ", ".join(zoo.FEATURES) + "\n")


def test_inspect_a_broken_model(run: Any, store: Path) -> None:
    """The error of an artifact names it."""
    (store / "bad.ubj").write_bytes(b"nonsense")
    refused = run("inspect", store, "bad")
    assert (refused.code, refused.out) == (1, "")
    assert re.fullmatch(r"modelcache: bad: the artifact is neither .*\n", refused.err)


# manifest


def test_manifest_lists_every_artifact(run: Any, store: Path) -> None:
    """Each artifact and nothing else is listed, with its SHA-256; a store takes what it lists and refuses the rest."""
    (store / "readme.md").write_text("no artifact")
    done = run("manifest", store)
    assert done.code == 0
    assert re.fullmatch(rf"4 artifacts \([\d.]+ KiB\) in {store}/MANIFEST\.json\. Whatever .*\n", done.out)
    listed = json.loads((store / "MANIFEST.json").read_text())["sha256"]
    files = ["named.tar.gz", "plain.ubj", "stopped.json", "tenant/classes.ubj"]
    assert listed == {file: hashlib.sha256((store / file).read_bytes()).hexdigest() for file in files}
    assert run("inspect", store).out.endswith(f"\n4 models in {store}.\n")
    (store / "plain.ubj").write_bytes(zoo.model(seed=1).ubj)
    (store / "added.ubj").write_bytes(zoo.model().ubj)
    shown = run("inspect", store)
    assert re.search(r"^added: UnsafeArtifactError\n  added\.ubj is not in MANIFEST\.json", shown.out, re.MULTILINE)
    assert re.search(r"^plain: CorruptArtifactError\n  the artifact's SHA-256 is", shown.out, re.MULTILINE)


def test_manifest_replaces_the_old_one_in_one_step(run: Any, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails leaves the old manifest, whole, and no other file; one that is done leaves the new one."""
    assert run("manifest", store).code == 0
    old = (store / "MANIFEST.json").read_bytes()
    (store / "added.ubj").write_bytes(zoo.model().ubj)
    before = set(store.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        refused = run("manifest", store)
    assert (refused.code, refused.err) == (1, "modelcache: [Errno 28] No space left on device\n")
    assert (store / "MANIFEST.json").read_bytes() == old
    assert set(store.iterdir()) == before
    assert run("manifest", store).out.startswith("5 artifacts ")
    assert "added.ubj" in json.loads((store / "MANIFEST.json").read_text())["sha256"]


def test_manifest_of_nothing_is_refused(run: Any, tmp_path: Path) -> None:
    """An empty manifest would refuse every model; a folder that is not there is named."""
    for folder, words in ((tmp_path, "There are no artifacts in"), (tmp_path / "nowhere", "does not exist")):
        refused = run("manifest", folder)
        assert (refused.code, refused.out) == (1, "")
        assert words in refused.err


def test_a_terminal_gets_colours_a_pipe_does_not(store: Path) -> None:
    """Nothing but text and line feeds goes into a pipe."""
    (store / "broken.ubj").write_bytes(b"broken")
    plain = CliRunner().invoke(app, ["inspect", str(store)])
    coloured = CliRunner().invoke(app, ["inspect", str(store)], env={"FORCE_COLOR": "1"})
    assert plain.exit_code == coloured.exit_code == 1
    assert "\x1b" in coloured.stdout
    assert re.search(r"[^\n -~]", plain.stdout) is None
