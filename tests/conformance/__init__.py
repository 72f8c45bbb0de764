"""What every adapter of a port must do, as checks that are run against each of them."""
