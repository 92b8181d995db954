"""The HTTP server: everything that knows HTTP, and nothing that another layer imports."""
