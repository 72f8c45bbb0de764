"""The model checker by the core's own records: slow, and what the model checker of Interlock is compared with."""

from model_checker_reference.walk import Walk, explore

__all__ = ["Walk", "explore"]
