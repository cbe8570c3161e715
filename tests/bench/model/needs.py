"""What the measurements of this folder ask of a machine, before they begin: what is missing is a
line, not a trace. Of Python's own library alone, so that --help needs nothing else."""

import argparse
import importlib.util
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
BUILD = pathlib.Path(os.environ.get("PREFILLD_BUILD", ROOT / "build"))
PIP_NAMES = {"google": "protobuf googleapis-common-protos", "google_crc32c": "google-crc32c",
             "grpc": "grpcio"}
TRANSFORMERS = {"cpu": ("torch", "transformers"), "cuda": ("torch", "transformers", "accelerate")}
CLIENT = ("grpc", "google", "google_crc32c", "numpy")  # what prefilld's Python client imports


def parser(doc: str) -> argparse.ArgumentParser:
    """Its help is the module's text, and the flags with their defaults."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def model_parser(doc: str) -> argparse.ArgumentParser:
    """The same, with --model."""
    with_model = parser(doc)
    with_model.add_argument("--model", type=model_directory, required=True, metavar="DIR",
                            help="a Hugging Face directory")
    return with_model


def model_directory(text: str) -> pathlib.Path:
    """A type for --model."""
    path = pathlib.Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"there is no {path / 'config.json'}; `make demo` makes "
                                         "a small model, random_model.py one of any shape")
    return path


def refuse(why: str) -> None:
    sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {why}")


def modules(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(PIP_NAMES.get(name, name) for name in missing)
        refuse(f"{sys.executable} lacks {', '.join(missing)}: {sys.executable} -m pip install "
               f"{packages}")


def server() -> None:
    if not (BUILD / "prefilld").is_file():
        refuse(f"there is no {BUILD / 'prefilld'}: `make build` makes it; PREFILLD_BUILD=DIR where "
               "it lies elsewhere")
