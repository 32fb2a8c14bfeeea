"""The house prices of the SageMaker multi-model example: the data, and the training of one model per city."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xgboost as xgb

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Table = NDArray[np.float64]

LOCATIONS = (
    "NewYork_NY",
    "LosAngeles_CA",
    "Chicago_IL",
    "Houston_TX",
    "Dallas_TX",
    "Phoenix_AZ",
    "Philadelphia_PA",
    "SanAntonio_TX",
    "SanDiego_CA",
    "SanFrancisco_CA",
)
COLUMNS = ("YEAR_BUILT", "SQUARE_FEET", "NUM_BEDROOMS", "NUM_BATHROOMS", "LOT_ACRES", "GARAGE_SPACES")
HOUSES_PER_CITY = 1000
LAST_YEAR = 2019

PARAMETERS: dict[str, Any] = {
    "max_depth": 5,
    "eta": 0.2,
    "gamma": 4,
    "min_child_weight": 6,
    "subsample": 0.8,
    "objective": "reg:squarederror",
    "nthread": 1,
}
ROUNDS = 25


def city_names(count: int) -> list[str]:
    """Return the cities of the example, and City_011 and so on beyond them."""
    more = (f"City_{number:03}" for number in range(len(LOCATIONS) + 1, count + 1))
    return [*LOCATIONS[:count], *more]


def make_houses(count: int, random: np.random.Generator) -> Table:
    """Return ``count`` random houses, in the order of ``COLUMNS``."""
    square_feet = np.trunc(random.normal(3000, 750, count))
    bedrooms = random.integers(2, 6, count, endpoint=True)
    bathrooms = random.integers(2, 6, count, endpoint=True) / 2
    acres = random.normal(1.0, 0.25, count).round(2)
    garage = random.integers(0, 3, count, endpoint=True)
    year = np.minimum(LAST_YEAR, np.trunc(random.normal(1995, 10, count)))
    return np.column_stack([year, square_feet, bedrooms, bathrooms, acres, garage])


def price(houses: Table) -> Table:
    """Return what each house costs: the formula that the models have to find out."""
    year, square_feet, bedrooms, bathrooms, acres, garage = houses.T
    extras = 10_000 * bedrooms + 15_000 * bathrooms + 15_000 * acres + 15_000 * garage
    value: Table = 150 * square_feet + extras - 5000 * (LAST_YEAR - year)
    return value


def train(city: str, seed: int) -> bytes:
    """Return the model of ``city``, as UBJSON, trained on houses of its own."""
    houses = make_houses(HOUSES_PER_CITY, np.random.default_rng([seed, *city.encode()]))
    matrix = xgb.DMatrix(houses, price(houses), feature_names=list(COLUMNS), nthread=1)
    booster = xgb.train({**PARAMETERS, "seed": seed}, matrix, ROUNDS)
    return bytes(booster.save_raw("ubj"))
