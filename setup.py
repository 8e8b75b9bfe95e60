"""What pyproject.toml cannot say: conf/ and jobs/ are at the top level, and ship inside the package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["infscan*"]), "infscan.conf", "infscan.jobs"],
    package_dir={"infscan.conf": "conf", "infscan.jobs": "jobs"},
)
