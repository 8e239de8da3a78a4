"""Packaging of keras_bandmf."""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).parent / "README.md"

PLOT = ["matplotlib>=3.7"]
EXAMPLES = [*PLOT, "scikit-learn>=1.3"]

setup(
    name="keras_bandmf",
    version="0.1.0",
    description="Differentially private training of Keras models with correlated noise (DP-BandMF)",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["keras_bandmf", "keras_bandmf.*"]),
    python_requires=">=3.10",
    install_requires=[
        "tensorflow>=2.16",
        "keras>=3.12",
        "numpy>=1.26",
        "scipy>=1.11",
        "absl-py>=1.0",
        "dp-accounting>=0.4.3",
    ],
    extras_require={
        "examples": EXAMPLES,
        "plot": PLOT,
        "nlp": [
            'keras-nlp>=0.32; python_version>="3.11"',
            'keras-nlp>=0.19,<0.26; python_version<"3.11"',
            "safetensors>=0.4",
        ],
        "tf-privacy": ['tensorflow-privacy==0.9.0; python_version<"3.12"'],
        "test": [*EXAMPLES, "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6", "ruff>=0.6"],
    },
)
