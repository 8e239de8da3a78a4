"""The entry for tools that run `setup.py`; pyproject.toml describes the package."""

from setuptools import setup

setup()
