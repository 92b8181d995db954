"""Clients of other people, each against our server: what works, and what is refused."""
