"""``modelcache demo``: the house prices of the SageMaker multi-model example, trained, served and measured."""

from modelcache.demo.run import run

__all__ = ["run"]
