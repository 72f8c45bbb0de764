"""What was explored of a policy before it was put in force; unknown of the switches until now."""

from __future__ import annotations

from typing import Final

STATEMENTS: Final = ("ALTER TABLE policy_switches ADD COLUMN walk TEXT",)
