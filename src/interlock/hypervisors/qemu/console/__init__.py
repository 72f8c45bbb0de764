"""The serial console and its log."""
