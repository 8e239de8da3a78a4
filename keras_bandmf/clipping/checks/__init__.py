"""Refuses or tests a model before it trains."""
