"""Packaging: the top-level folders become one package, `permafrost`.

`model/` is imported as `permafrost.model`, and so on, so that the checkout keeps short paths while nothing called `data` or `model`
becomes importable on a user's machine; `permafrost/` itself is the front door. Project metadata lives in pyproject.toml; only
the mapping needs code.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = ("configs", "data", "heads", "launcher", "model")


def packages() -> list[str]:
    """Every folder that holds an __init__.py, under its installed name."""
    found = ["permafrost"]
    for folder in FOLDERS:
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            found.append(".".join(("permafrost", *init.parent.relative_to(ROOT).parts)))
    return found


setup(
    packages=packages(),
    package_dir={"permafrost": "permafrost"} | {f"permafrost.{folder}": folder for folder in FOLDERS},
    package_data={
        "permafrost": ["py.typed"],
        "permafrost.model": ["pretrained/*.safetensors", "pretrained/*.json"],
        "permafrost.model.kernels.window_attention": ["csrc/*"],
        "permafrost.configs": ["*.json", "deepspeed/*.json", "accelerate/*.yaml", "hostfile.example"],
    },
)
