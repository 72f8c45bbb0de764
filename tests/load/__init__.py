"""Load from many clients on a real server process."""
