"""Metadata and layout: the folder ``kernels/`` installs as ``wcr_fast.kernels``."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["scikit-learn>=1.4", "matplotlib>=3.8", "rich>=13"]

setup(
    name="wcr-fast",
    version="0.1.0",
    description="Fast and exact weight-concentration penalties and magnitude pruning for PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["wcr_fast", "wcr_fast.*"]), "wcr_fast.kernels"],
    package_dir={"wcr_fast": "wcr_fast", "wcr_fast.kernels": "kernels"},
    package_data={"wcr_fast": ["py.typed", "watch.cpp", "torch_path/scan.c"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
        "safetensors>=0.4",
    ],
    extras_require={
        "demo": DEMO,
        "trainers": ["transformers>=4.46", "accelerate>=1.0", "lightning>=2.4"],
        "bench": ["matplotlib>=3.8", "pytest-benchmark>=5"],
        "test": [
            *DEMO,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.15",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["wcr-fast=wcr_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
)
