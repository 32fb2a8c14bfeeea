"""The data of the demo is that of the SageMaker example."""

from __future__ import annotations

import numpy as np
import pytest
import xgboost as xgb

from modelcache.demo.houses import COLUMNS, LOCATIONS, city_names, make_houses, price, train


def test_the_price_is_the_formula() -> None:
    """A house costs what the issue's formula says, column by column."""
    house = dict(zip(COLUMNS, [1990, 3047, 5, 1.5, 1.11, 2], strict=True))
    expected = (
        150 * house["SQUARE_FEET"]
        + 10_000 * house["NUM_BEDROOMS"]
        + 15_000 * house["NUM_BATHROOMS"]
        + 15_000 * house["LOT_ACRES"]
        + 15_000 * house["GARAGE_SPACES"]
        - 5_000 * (2019 - house["YEAR_BUILT"])
    )
    assert price(np.array([list(house.values())])) == pytest.approx([expected])


def test_the_columns_are_distributed_as_in_the_example() -> None:
    """Each column has the values, the mean and the spread that it should."""
    houses = make_houses(20_000, np.random.default_rng(0))
    year, square_feet, bedrooms, bathrooms, acres, garage = houses.T
    assert set(bedrooms) == {2, 3, 4, 5, 6}
    assert set(bathrooms) == {1, 1.5, 2, 2.5, 3}
    assert set(garage) == {0, 1, 2, 3}
    assert np.array_equal(square_feet, np.trunc(square_feet))
    assert np.array_equal(year, np.trunc(year))
    assert np.array_equal(acres, acres.round(2))
    assert year.max() == 2019
    assert np.mean(year == 2019) > 0.005, "what would be built later is built in 2019"
    for column, mean, spread in ((square_feet, 3000, 750), (acres, 1, 0.25), (np.minimum(year, 1995), 1991, 5.8)):
        assert column.mean() == pytest.approx(mean, rel=0.02)
        assert column.std() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("count", [1, 10, 12])
def test_there_are_as_many_cities_as_asked_for(count: int) -> None:
    """The ten of the example come first, and more get numbers."""
    names = city_names(count)
    assert names == [*LOCATIONS, "City_011", "City_012"][:count]


def test_a_city_has_the_model_of_its_name_and_seed() -> None:
    """Same seed and city, same model, bit for bit; another of either, another model."""
    model = train("Chicago_IL", 0)
    assert train("Chicago_IL", 0) == model
    assert train("Dallas_TX", 0) != model
    assert train("Chicago_IL", 1) != model


def test_a_model_has_learned_the_formula() -> None:
    """On houses it has not seen, half of the predictions are within 4 % of the formula."""
    booster = xgb.Booster()
    booster.load_model(bytearray(train("Chicago_IL", 0)))
    houses = make_houses(1000, np.random.default_rng(7))
    predicted = booster.predict(xgb.DMatrix(houses, feature_names=list(COLUMNS)))
    assert booster.num_boosted_rounds() == 25
    assert np.median(np.abs(predicted / price(houses) - 1)) < 0.04
