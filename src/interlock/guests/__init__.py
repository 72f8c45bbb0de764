"""The small guest: a minimal Linux built from the distribution's packages, for demos and tests."""
