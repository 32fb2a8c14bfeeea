"""Predictors from outside: their own formats, and imports from the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

import plugin
import zoo
from modelcache import CorruptArtifactError, InvalidInputError, MemoryStore, ModelCacheError
from modelcache.testing import check_predictor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from conftest import MakeRegistry

ROWS = [[1.0, 10.0], [2.0, 20.0]]


def test_it_keeps_the_contract() -> None:
    """A predictor of another library passes the suite that is shipped."""
    check_predictor(lambda: (plugin.Scaled, plugin.artifact()))


@pytest.mark.parametrize("file", ["raw.ubj", "packed.tar.gz"])
async def test_it_reads_its_own_format(make_registry: MakeRegistry, file: str) -> None:
    """What is no XGBoost model goes to a predictor as it is, out of an archive too."""
    data = plugin.artifact() if file == "raw.ubj" else zoo.pack({"factors.npz": plugin.artifact()})
    registry = await make_registry(MemoryStore({file: data}), predictor="plugin:Scaled")
    assert np.array_equal(await registry.predict(file, ROWS), np.array([32.0, 64.0], np.float32))
    assert registry.loaded()[0].format == "other"


async def test_its_errors_reach_the_caller(make_registry: MakeRegistry) -> None:
    """A predictor may raise the package's errors, whose module a worker does not import otherwise."""
    registry = await make_registry(
        MemoryStore({"good.ubj": plugin.artifact(), "bad.ubj": b"no zip"}), predictor="plugin:Scaled"
    )
    with pytest.raises(CorruptArtifactError, match="no factors"):
        await registry.predict("bad", ROWS)
    with pytest.raises(InvalidInputError, match="there is no leaf"):
        await registry.predict("good", ROWS, output="leaf")


async def test_what_it_says_of_itself_may_be_numpys(make_registry: MakeRegistry) -> None:
    """Numbers and texts of NumPy become plain ones, and names in an array are names like any others."""
    registry = await make_registry(MemoryStore({"m.ubj": plugin.artifact()}), predictor="plugin:Numpyish")
    info = await registry.load("m")
    facts = (info.n_features, info.feature_names, info.n_outputs, info.n_trees, info.best_iteration)
    assert facts == (2, ("a", "b"), 1, 7, 3)
    assert (info.objective, info.booster) == ("sums", "none")
    plain = [info.n_features, info.n_outputs, info.n_trees, info.best_iteration]
    assert {type(fact) for fact in plain} == {int}
    assert {type(fact) for fact in (info.objective, info.booster, *(info.feature_names or ()))} == {str}
    swapped = pd.DataFrame(ROWS, columns=["a", "b"])[["b", "a"]]
    assert np.array_equal(await registry.predict("m", swapped), [32.0, 64.0])


@pytest.mark.parametrize("predictor", ["Scaled", "Unnamed"])
async def test_it_need_not_have_names(make_registry: MakeRegistry, predictor: str) -> None:
    """None is no names, and so is an array of none."""
    registry = await make_registry(MemoryStore({"m.ubj": plugin.artifact()}), predictor=f"plugin:{predictor}")
    assert (await registry.load("m")).feature_names is None
    assert np.array_equal(await registry.predict("m", ROWS), [32.0, 64.0])


async def test_an_archive_of_two_files_is_refused(make_registry: MakeRegistry) -> None:
    """A1: which of two files is the model is not guessed for another predictor either."""
    data = zoo.pack({"one.npz": plugin.artifact(), "two.npz": plugin.artifact()})
    registry = await make_registry(MemoryStore({"m.tar.gz": data}), predictor="plugin:Scaled")
    with pytest.raises(Exception, match=r"one\.npz.*two\.npz"):
        await registry.predict("m", ROWS)


SCRIPTED = "plugin:Scripted"
FLOATS = r"has to return float32 of shape \(2,\) or \(2, k\)"
FAULTS = {
    "None": f"returned NoneType for 2 rows: it {FLOATS}",
    "[1.0, 2.0]": f"returned list for 2 rows: it {FLOATS}",
    "np.zeros(1)": rf"returned shape \(1,\) for 2 rows: it {FLOATS}",
    "np.zeros(())": rf"returned shape \(\) for 2 rows: it {FLOATS}",
    "np.zeros((2, 1, 1, 1))": r"returned shape \(2, 1, 1, 1\) for 2 rows",
    "np.array(['1', '2'])": "returned an array of <U1 for 2 rows",
    "np.array([1j, 2j])": "returned an array of complex128 for 2 rows",
    "{}['x']": r"the predictor raised KeyError: 'x' \(rows that it cannot take are refused by ValueError\)",
    "fail(RuntimeError())": r"the predictor raised RuntimeError \(",
}


def scripts(answers: Iterable[str]) -> MemoryStore:
    """Return models m0, m1 ..., each of which answers with what its text evaluates to."""
    return MemoryStore({f"m{number}.ubj": plugin.scripted(predict=answer) for number, answer in enumerate(answers)})


async def test_a_wrong_answer_is_the_predictors_fault(make_registry: MakeRegistry, subtests: pytest.Subtests) -> None:
    """Whoever sent rows is not told that they are bad when the predictor breaks its contract."""
    registry = await make_registry(scripts(FAULTS), predictor=SCRIPTED)
    for number, (answer, fault) in enumerate(FAULTS.items()):
        with subtests.test(answer=answer):
            with pytest.raises(ModelCacheError, match=f"There are no predictions for these rows: .*{fault}") as caught:
                await registry.predict(f"m{number}", ROWS)
            found = (type(caught.value), caught.value.http_status, caught.value.model)
            assert found == (ModelCacheError, 500, f"m{number}")


async def test_a_value_error_refuses_the_rows(make_registry: MakeRegistry) -> None:
    """The message of a ValueError is passed on; without one its type is named. Large calls are no different."""
    store = MemoryStore({
        "said.ubj": plugin.scripted(predict="fail(ValueError('negative'))"),
        "silent.ubj": plugin.scripted(predict="fail(UnicodeError())"),
    })  # fmt: skip
    registry = await make_registry(store, predictor=SCRIPTED)
    for rows in (ROWS, np.zeros((5_000, 2))):
        with pytest.raises(InvalidInputError, match=r"refused these rows: negative$") as caught:
            await registry.predict("said", rows)
        assert caught.value.model == "said"
    with pytest.raises(InvalidInputError, match="refused these rows: the predictor raised UnicodeError without a mess"):
        await registry.predict("silent", ROWS)


async def test_other_numbers_are_made_float32(make_registry: MakeRegistry) -> None:
    """An array of other numbers is no reason to fail a call."""
    answers = ["np.array([3, 4])", "np.array([3.0, 4.0])", "np.array([3, 4], 'f2')"]
    registry = await make_registry(scripts(answers), predictor=SCRIPTED)
    for number in range(len(answers)):
        answered = await registry.predict(f"m{number}", ROWS)
        assert answered.dtype == np.float32
        assert answered.tolist() == [3, 4]


async def test_a_predictor_that_describes_its_model_wrongly_is_at_fault(make_registry: MakeRegistry) -> None:
    """The artifact may be as good as any; the worker lives on."""
    store = MemoryStore({"m.ubj": plugin.scripted(n_features="'six'"), "n.ubj": plugin.scripted(n_trees="[1]")})
    registry = await make_registry(store, predictor=SCRIPTED)
    for name, said in (("m", "ValueError: invalid literal"), ("n", "TypeError: int")):
        with pytest.raises(ModelCacheError, match=rf"does not describe its model .*{said}.*check_predictor") as caught:
            await registry.load(name)
        assert (type(caught.value), caught.value.model) == (ModelCacheError, name)
    assert registry.stats().worker_restarts == 0


async def test_what_a_predictor_says_of_its_model_need_not_be_plain(make_registry: MakeRegistry) -> None:
    """NumPy's numbers are numbers."""
    data = plugin.scripted(predict="rows[:, 0]", n_trees="np.int64(7)", n_features="np.uint8(2)")
    registry = await make_registry(MemoryStore({"m.ubj": data}), predictor=SCRIPTED)
    info = await registry.load("m")
    assert (info.n_trees, info.n_features) == (7, 2)


async def test_a_load_that_fails_without_a_word_names_the_exception(make_registry: MakeRegistry) -> None:
    """An error always says something."""
    registry = await make_registry(MemoryStore({"m.ubj": plugin.scripted(load="fail(EOFError())")}), predictor=SCRIPTED)
    with pytest.raises(CorruptArtifactError, match="the predictor raised EOFError without a message"):
        await registry.load("m")
