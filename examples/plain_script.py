"""All in one plain script: train a model, put it into a folder, serve it from there.

There is no ``if __name__ == "__main__":`` around it, and none is needed: workers never import the script.
"""

import asyncio
import tempfile
from pathlib import Path

import numpy as np
import xgboost as xgb

from modelcache import ModelRegistry

random = np.random.default_rng(0)
rooms, area = random.integers(1, 7, 500), random.normal(120, 30, 500)
prices = 20_000 * rooms + 3_000 * area
flats = xgb.DMatrix(np.column_stack([rooms, area]), prices, feature_names=["rooms", "area"])
booster = xgb.train({"max_depth": 4, "nthread": 1}, flats, num_boost_round=30)


async def serve(folder: str) -> None:
    async with ModelRegistry(folder, memory_budget="64 MiB", workers=1) as registry:
        for _ in range(2):
            answer = await registry.invoke("flats", [[3, 110], [5, 160]])
            first, second = answer.predictions
            print(f"3 rooms, 110 m2: {first:,.0f}   5 rooms, 160 m2: {second:,.0f}   (from {answer.tier})")
        print(registry)


with tempfile.TemporaryDirectory() as folder:
    booster.save_model(Path(folder, "flats.ubj"))
    asyncio.run(serve(folder))
