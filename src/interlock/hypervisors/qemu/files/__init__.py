"""The files of one instance on its host."""
