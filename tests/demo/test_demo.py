"""The demo is run once, small; each test holds one of its promises against what it printed and left behind."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import xgboost as xgb
from matplotlib.image import imread
from rich.console import Console

from modelcache import Timings
from modelcache.cli import main
from modelcache.demo import run
from modelcache.demo.chart import draw
from modelcache.demo.fleet import NEWCOMERS, Fleet, pack
from modelcache.demo.houses import LOCATIONS, make_houses, price, train
from modelcache.demo.report import print_comparison
from modelcache.demo.story import Call

if TYPE_CHECKING:
    from pathlib import Path

MODELS, CALLS = 3, 12

CALL = re.compile(
    r"^(?P<city>\w+) +(?P<house>\d{4} +\d+ +\d +[\d.]+ +[\d.]+ +\d) +\$(?P<predicted>[\d,]+) +\$(?P<formula>[\d,]+)"
    r" +(?P<tier>cold|warm) +\d+\.\d\d ms$",
    re.MULTILINE,
)


@dataclass
class Demo:
    """What one run printed, act by act, and where its files are."""

    out: Path
    text: str
    acts: list[str]


def tell(out: Path, *, seed: int = 5) -> str:
    printed = io.StringIO()
    run(Console(file=printed, width=200, markup=False, highlight=False), out=out, models=MODELS, calls=CALLS, seed=seed)
    return printed.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo, run in a folder that an earlier run has left its newcomers in."""
    out = tmp_path_factory.mktemp("demo") / "not there yet"
    (out / "models").mkdir(parents=True)
    (out / "models" / f"{NEWCOMERS[0]}.tar.gz").write_bytes(b"of an earlier run")
    text = tell(out)
    acts = re.split(
        r"^(?=12 calls of|Seattle_WA\.tar\.gz is|12 calls more|Portland_OR is|The six|Cold against|Where everything)",
        text,
        flags=re.MULTILINE,
    )
    return Demo(out, text, acts)


def test_it_prints_each_call(demo: Demo) -> None:
    """A call is a line: city, house, price, formula, cold or warm, time; a city's first call is the cold one."""
    assert demo.text.startswith("Trained 5 models")
    calls = list(CALL.finditer(demo.acts[1]))
    assert len(calls) == CALLS
    cities = [call["city"] for call in calls]
    assert set(cities) <= set(LOCATIONS[:MODELS])
    colds = [call["tier"] == "cold" for call in calls]
    assert colds == [city not in cities[:place] for place, city in enumerate(cities)]


def test_its_prices_are_those_of_the_models(demo: Demo) -> None:
    """The printed formula is that of the printed house, and the prediction is XGBoost's for it, to the dollar."""
    for call in CALL.finditer(demo.acts[1]):
        house = np.array([[float(cell) for cell in call["house"].split()]])
        predicted, formula = (float(call[name].replace(",", "")) for name in ("predicted", "formula"))
        assert formula == pytest.approx(price(house)[0], abs=1)
        booster = xgb.Booster()
        booster.load_model(bytearray(train(call["city"], 5)))
        assert predicted == pytest.approx(float(booster.inplace_predict(house)[0]), abs=1)
        assert predicted == pytest.approx(formula, abs=100_000)


def test_a_new_city_is_served_without_a_restart(demo: Demo) -> None:
    """A file copied in while the registry serves is found by the next call."""
    calls = list(CALL.finditer(demo.acts[2]))
    assert [(call["city"], call["tier"]) for call in calls] == [("Seattle_WA", "cold"), ("Seattle_WA", "warm")]
    assert re.search(r"^Nothing was restarted: \d+ workers, 0 restarts\.$", demo.acts[2], re.MULTILINE)


def test_a_budget_smaller_than_the_fleet_evicts(demo: Demo) -> None:
    """Models leave for others, are loaded again when called, and the bytes in use stay within the budget."""
    act = demo.acts[3]
    assert act.startswith("12 calls more, with a budget for 2 of the 4 models")
    assert " 2 models evicted.\n" in act
    shown = re.findall(r"^\w+ +(?:cold|warm) +\d+\.\d\d ms(?:   evicts (.+))?$", act, re.MULTILINE)
    assert len(shown) == 10
    evictions = re.search(
        r"^(\d+) evictions in all\. In use at most: ([\d.]+) KiB of ([\d.]+) KiB\.$", act, re.MULTILINE
    )
    assert evictions is not None
    assert int(evictions[1]) >= 2 + len([names for names in shown if names])
    assert any(shown), "no call made another model leave"
    assert 0 < float(evictions[2]) <= float(evictions[3])


def test_many_first_callers_share_one_load(demo: Demo) -> None:
    """F1: 200 concurrent first calls of one city make one load."""
    assert re.search(
        r"^200 answers after [\d.]+ ms, from 1 load that 199 callers shared\.$", demo.acts[4], re.MULTILINE
    )


def test_it_ends_with_the_six_metrics(demo: Demo) -> None:
    """The six figures of SageMaker multi-model endpoints, each with its count."""
    rows = re.findall(r"^(model_\w+|loaded_model_count) +(?:ms +)?(\d+) ", demo.acts[5], re.MULTILINE)
    counts = {name: int(count) for name, count in rows}
    assert list(counts) == [
        "model_loading_wait_time",
        "model_downloading_time",
        "model_loading_time",
        "model_unloading_time",
        "model_cache_hit",
        "loaded_model_count",
    ]
    loads_of_all = 4  # preparing for the smaller budget, it makes sure of each city
    assert counts["model_cache_hit"] == CALLS + 2 + loads_of_all + CALLS + 200
    assert counts["model_loading_wait_time"] == counts["model_loading_time"] + 199


def test_it_compares_cold_and_warm(demo: Demo) -> None:
    """Cold and warm calls together are all that it made one by one, and warm ones are faster."""
    rows = re.findall(r"^(cold|warm): .+? +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", demo.acts[6], re.MULTILINE)
    cold, warm = rows
    assert int(cold[1]) + int(warm[1]) == CALLS + 2 + CALLS
    assert float(warm[3]) < float(cold[3])


def test_it_says_where_everything_is(demo: Demo) -> None:
    """The paths printed at the end are there, and the commands proposed work."""
    assert f"  chart   {demo.out / 'cold-and-warm.png'}\n" in demo.acts[7]
    files = {file.relative_to(demo.out).as_posix() for file in demo.out.rglob("*") if file.is_file()}
    cities = [*LOCATIONS[:MODELS], *NEWCOMERS]
    assert files == {
        *(f"models/{city}.tar.gz" for city in cities),
        *(f"newcomers/{city}.tar.gz" for city in NEWCOMERS),
        "houses.csv",
        "cold-and-warm.png",
    }


def test_the_sample_houses_can_be_predicted(demo: Demo, monkeypatch: Any, capsys: Any) -> None:
    """What it proposes to try next gives five prices."""
    arguments = ["predict", str(demo.out / "models"), LOCATIONS[MODELS - 1], str(demo.out / "houses.csv")]
    monkeypatch.setattr("sys.argv", ["modelcache", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert len([float(line) for line in capsys.readouterr().out.splitlines()]) == 5


def test_the_chart_is_a_picture(demo: Demo) -> None:
    """The PNG can be read, has the size that was asked for, and is not blank."""
    pixels = imread(demo.out / "cold-and-warm.png")
    assert pixels.shape[:2] == (750, 1500)
    assert len(np.unique(pixels[::4, ::4].reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_it_fits_a_terminal(demo: Demo) -> None:
    """No line but those with paths is wider than 80 columns, and nothing but text is printed into a pipe."""
    wide = [line for line in demo.text.splitlines() if len(line) > 79 and str(demo.out) not in line]
    assert wide == []
    assert re.search(r"[^\n -~]", demo.text) is None


def test_the_same_seed_tells_the_same_story(demo: Demo, tmp_path: Path) -> None:
    """Calls, houses, prices and evictions are the same again; only what was measured differs."""
    again = tell(tmp_path / "again")
    calls = re.compile(r"^(\w+ .*(?:cold|warm)) +\d+\.\d\d ms(.*)$", re.MULTILINE)
    assert calls.findall(again) == calls.findall(demo.text)
    assert CALL.findall(tell(tmp_path / "other", seed=6)) != CALL.findall(demo.text)


def test_an_artifact_is_packed_as_sagemaker_packs_it() -> None:
    """A gzipped tar with the one member ``xgboost-model``, the same bytes each time."""
    assert pack(b"{model}") == pack(b"{model}")
    with tarfile.open(fileobj=io.BytesIO(pack(b"{model}")), mode="r:gz") as tar:
        assert tar.getnames() == ["xgboost-model"]
        member = tar.extractfile("xgboost-model")
        assert member is not None
        assert member.read() == b"{model}"


def test_a_newcomer_waits_outside_of_the_store(tmp_path: Path) -> None:
    """What is to be copied in later is not in the store before."""
    fleet = Fleet(tmp_path, 1)
    fleet.train(0, iter)
    assert [file.name for file in fleet.models.iterdir()] == ["NewYork_NY.tar.gz"]
    fleet.copy_in(NEWCOMERS[0])
    assert (fleet.models / f"{NEWCOMERS[0]}.tar.gz").read_bytes() == pack(train(NEWCOMERS[0], 0))


@pytest.mark.parametrize("colds", [[True], [False], [True, False]])
def test_chart_and_table_do_without_one_kind(colds: list[bool], tmp_path: Path) -> None:
    """With too few calls there may be no warm one, or no cold one."""
    house = make_houses(1, np.random.default_rng(0))
    calls = [
        Call("at random", "NewYork_NY", house, 1.0, cold, Timings(0.0, 0.001, 0.001, 0.001, 0.003)) for cold in colds
    ]
    draw(calls, tmp_path / "chart.png")
    assert imread(tmp_path / "chart.png").size
    printed = io.StringIO()
    print_comparison(Console(file=printed, width=80), calls)
    assert [kind in printed.getvalue() for kind in ("cold: ", "warm: ")] == [True in colds, False in colds]
