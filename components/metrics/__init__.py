"""Counters, FLOPs, memory, and the sinks that they are written to."""
