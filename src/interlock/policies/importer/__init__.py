"""Conversion of policy files of other systems."""

from interlock.policies.importer.nova_policy import Imported, import_nova_policy

__all__ = ["Imported", "import_nova_policy"]
