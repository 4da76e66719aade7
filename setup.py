"""Distribution ``guard-distill``. ``configs/`` travels inside the wheel as the package ``distill.configs``."""

from pathlib import Path

from setuptools import find_packages, setup

EXPORT = ["pyarrow>=15"]
TEST = ["pytest>=8", "pytest-timeout", "pytest-xdist", "selenium>=4.20", "setuptools>=77", "datasets>=3", *EXPORT]

setup(
    name="guard-distill",
    version="0.1.0",
    description="Small, adversarially robust training sets from huge ones: distributed GUARD dataset distillation",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["distill*", "data_prep*", "launchers*"]), "distill.configs"],
    package_dir={"distill.configs": "configs"},
    package_data={"distill.configs": ["**/*.yaml"], "distill": ["py.typed", "data/*.txt", "report/page.*"]},
    install_requires=[
        # 2.13 exists here and there as a CPU-only build that does not fit PyPI's torchvision.
        "torch>=2.11,!=2.13.*",
        "torchvision>=0.26",
        "numpy>=1.26",
        "scipy>=1.11",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "safetensors>=0.4",
        "pillow>=10.1",
        "scikit-learn>=1.4",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "tabulate>=0.9",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "pyyaml>=6",
    ],
    extras_require={
        # FFCV is compiled at installation: apt-get install libopencv-dev libturbojpeg0-dev pkg-config
        "ffcv": ["ffcv>=1.0.2"],
        "dali": ["nvidia-dali-cuda130>=1.50"],
        "dali-cuda12": ["nvidia-dali-cuda120>=1.50"],
        "deepspeed": ["deepspeed>=0.19"],
        "slurm": ["submitit>=1.5"],
        # Parquet, as Hugging Face's datasets reads it.
        "export": EXPORT,
        "test": TEST,
        "dev": [*TEST, "ruff", "mypy>=1.10", "build", "types-tabulate", "types-PyYAML", "types-tqdm"],
    },
    entry_points={"console_scripts": ["guard=distill.cli:main"]},
)
