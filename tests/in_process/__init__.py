"""Servers, hosts and agents in the process of a test, on simulated guests and, where it matters, in virtual time."""
