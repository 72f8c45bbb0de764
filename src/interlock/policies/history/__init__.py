"""Recorded history: replay under another policy, and thresholds derived from it."""
