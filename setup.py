"""Packaging: `kernels/` stands at the top level of the repository and is installed as `fused_resblock.kernels`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
about: dict[str, str] = {}
exec((ROOT / "fused_resblock" / "version.py").read_text(encoding="utf-8"), about)

DEMO = ["scikit-learn", "matplotlib", "numpy", "pillow", "tqdm"]

setup(
    name="fused_resblock",
    version=about["__version__"],
    description="Fused residual blocks for PyTorch: the same modules and parameters, fewer passes through memory",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fused_resblock contributors",
    license="MIT",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["fused_resblock", "fused_resblock.*"], exclude=["fused_resblock.kernels*"]),
        "fused_resblock.kernels",
    ],
    package_dir={"fused_resblock.kernels": "kernels"},
    package_data={
        "fused_resblock": ["py.typed"],
        "fused_resblock.demo": ["digits.pt"],
        "fused_resblock.kernels": ["configs/*.json"],
    },
    python_requires=">=3.10",
    # floors, not pins: torch pins its own triton, and its CPU build comes without one
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system=="Linux"'],
    extras_require={
        "demo": DEMO,
        "test": [
            *DEMO,
            "setuptools>=70.1",  # a wheel is built with the one that is there
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "torchvision",
            "timm",
        ],
        "dev": ["ruff", "mypy", "pre-commit", "onnxruntime", "onnx", "onnxscript"],
    },
    entry_points={"console_scripts": ["fused-resblock = fused_resblock.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Environment :: GPU :: NVIDIA CUDA",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
