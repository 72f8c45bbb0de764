"""The SQLite store of instances, requests, events and the other records. A store decides nothing."""
