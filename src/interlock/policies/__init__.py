"""Policies as files, and the tools for them. What a policy means is in `core`.

The names in `__all__` are public, here and in `comparison`, `explanation`, `fleet`, `lint`, `model_checker` and
`rehearsal`: they change only with a new minor version, and the changelog says how. `model_checker` needs NumPy
(`pip install 'interlock[policies]'`); the others need msgspec only.
"""

from interlock.policies.language.loader import PolicyText, builtin_names, compile_named, load, read

__all__ = ["PolicyText", "builtin_names", "compile_named", "load", "read"]
