"""Packaging of Logratio: what is installed and what it needs. Versions are pinned in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="logratio",
    version="0.1.0",
    description="A from-scratch PyTorch trainer that teaches small language models from preference pairs",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["trainer", "trainer.*", "kernels", "kernels.*", "data_tools", "data_tools.*", "eval", "eval.*"]
    ),
    package_data={"trainer": ["configs/*.toml"], "eval": ["tasks/*.toml"]},
    install_requires=[
        "torch",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "numpy",
        "jinja2",
        "gguf",
        "tqdm",
        'triton; platform_system == "Linux"',
    ],
    extras_require={
        # transformers (with protobuf, for sentencepiece models), peft and scikit-learn are oracles: tests compare with
        # them, and eval.bench times transformers where it is installed. httpx is the extra "endpoints" at work.
        "test": [
            "pytest",
            "hypothesis",
            "packaging",
            "ruff",
            "mypy",
            "transformers",
            "peft",
            "protobuf",
            "scikit-learn",
            "httpx",
        ],
        "plots": ["matplotlib", "tensorboard"],
        "endpoints": ["httpx"],
        "qlora": ["bitsandbytes"],
    },
)
