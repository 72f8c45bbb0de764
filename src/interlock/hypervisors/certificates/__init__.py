"""Certificates of hosts: the server's CA, and the key and certificate of one host."""
