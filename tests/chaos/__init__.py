"""Fault tests: real parts are killed, stopped and cut off under load, and one oracle judges."""
