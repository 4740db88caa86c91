"""OpenAI's HTTP interface: schema (what comes in), app (routes), replies (what goes out)."""
