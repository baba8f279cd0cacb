"""The one thing pyproject.toml cannot say: the top-level folder kernels/ is installed as llmfast.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["llmfast*"], exclude=["llmfast.kernels"]), "llmfast.kernels"],
    package_dir={"llmfast.kernels": "kernels"},
)
