"""The HTTP door: what is asked comes in here, and what is answered goes out. It speaks to `service` only."""
