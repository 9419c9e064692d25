"""Servers that hold buckets, started by the tests on this machine. See `everywhere.py` for the table of them."""
