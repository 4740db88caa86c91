"""Paged attention: one contract (base), one implementation a device."""
