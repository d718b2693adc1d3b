"""What pyproject.toml cannot say: the tutorials lie in notebooks/ and travel in the package as llmnb/tutorials."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llmnb*"]), "llmnb.tutorials"],
    package_dir={"llmnb.tutorials": "notebooks"},
    package_data={"llmnb": ["py.typed", "notebook/static/**/*"], "llmnb.tutorials": ["*.ipynb"]},
)
