"""The mixture-of-experts layer: a router, and experts that run where they are placed."""
