"""Measurements that print their numbers: `mmada bench NAME`."""
