"""Encode images to latent shards.

    python extract_features.py --images DIR --out DIR --vae NAME_OR_DIR --image-size 256
    torchrun --nproc_per_node 8 extract_features.py ...     the same files, eight times as fast

After an interruption, the same command keeps the shards that were finished.
"""

import argparse

from fastdit.errors import friendly_exit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `extract_features`, and --device."""
    parser.add_argument(
        "--images",
        required=True,
        help="folder with a subfolder per class, folder of images, CSV or JSONL file with path and label, WebDataset, "
        "ImageNet's or CIFAR's archive, or Parquet files of the Hugging Face hub",
    )
    parser.add_argument("--out", required=True, help="output folder; it appears once it is complete")
    parser.add_argument(
        "--vae", required=True, help="AutoencoderKL or AutoencoderDC of diffusers: a local folder or a hub name"
    )
    parser.add_argument("--image-size", default="256", help="center crop in pixels: a side, or WIDTHxHEIGHT (256)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per batch and process (32)")
    parser.add_argument("--dtype", default="float16", help="storage dtype: float16 (default) or float32")
    parser.add_argument(
        "--precision",
        help="compute dtype of the VAE: float32 (default on a CPU), bfloat16 (default on a GPU) or float16",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the encoder (default: on a GPU, for 10,000 images or more)",
    )
    parser.add_argument(
        "--adm-exact",
        action="store_true",
        help="read images as ADM and DiT: no EXIF orientation, transparency dropped, 16 bits as Pillow converts them",
    )
    parser.add_argument(
        "--workers", type=int, help="decoding threads of each process (default: its share of the cores)"
    )
    parser.add_argument("--shard-size", type=int, default=2048, help="images per shard (2048)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds latents")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: this process's GPU if there is one)")


@friendly_exit()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = vars(parser.parse_args(argv))

    # importing torch takes seconds: --help and invalid arguments do not wait for it
    from fastdit.data.extract import extract_features
    from fastdit.distributed import close, init

    ranks = init(arguments.pop("device"))
    try:
        extract_features(**arguments, ranks=ranks)
    finally:
        close()


if __name__ == "__main__":
    main()
