"""Static checks of a policy, without walking its states."""

from interlock.policies.lint.checker import check, check_file
from interlock.policies.lint.finding_kinds import KINDS, FindingGroup, FindingKind, grouped
from interlock.policies.lint.findings import Finding, Severity

__all__ = ["KINDS", "Finding", "FindingGroup", "FindingKind", "Severity", "check", "check_file", "grouped"]
