"""QEMU processes: starting, finding, watching and ending them."""
