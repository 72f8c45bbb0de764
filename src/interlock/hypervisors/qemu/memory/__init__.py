"""Guest memory: save, restore, dump."""
