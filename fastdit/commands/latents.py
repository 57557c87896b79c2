"""Folders of latents: import.

Each function adds its arguments to a parser and returns what runs it.
"""

from argparse import ArgumentParser, Namespace

from fastdit.commands.arguments import Command


def import_(parser: ArgumentParser) -> Command:
    """Turn latents that other programs wrote into shards.

    fastdit import fast-dit features latents --vae stabilityai/sd-vae-ft-ema
    FORMAT and SRC:
      fast-dit      the --feature-path of fast-DiT: imagenet256_features/*.npy and imagenet256_labels/*.npy
      repa          REPA's folder vae-sd, the folder that holds it, or a zip file of it
      edm2          the same of EDM2; writes OUT-vae, which decodes to [-1, 1], and needs --vae
      lightningdit  a folder of latents_*.safetensors and latents_stats.pt
      cerebras      a split of create_imagenet_latents.py's --dest_dir: <class>/*.npz
    Values are kept. No latent is mirrored: without latents of mirror images, train with data.hflip=false.
    After an interruption, the same command keeps the shards that were finished.
    """
    parser.add_argument("layout", metavar="FORMAT", help="fast-dit, repa, edm2, lightningdit or cerebras")
    parser.add_argument("src", metavar="SRC", help="a folder, or a zip file")
    parser.add_argument("out", metavar="OUT", help="output folder; it appears once it is complete")
    parser.add_argument("--vae", help="the autoencoder that encoded them, a folder or a hub name: it is compared with "
                                      "the latents, recorded, and decodes preview.png")  # fmt: skip
    parser.add_argument("--image-size", help="of the images: a side, or WIDTHxHEIGHT (by the autoencoder)")
    parser.add_argument("--scale", type=float, help="what training multiplies latents by (as the program does: "
                                                    "0.18215; lightningdit: 1, after latents_stats.pt)")  # fmt: skip
    parser.add_argument("--classes", metavar="FILE", help="a text file with the name of a class in each line")
    parser.add_argument("--mirrored", metavar="DIR", help="cerebras: the same files of the mirror images")
    parser.add_argument("--dtype", help="storage dtype: float32 or float16 (that of the source)")
    parser.add_argument("--shard-size", type=int, default=2048, help="latents per shard (2048)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds latents")
    options = [a.dest for a in parser._actions if a.dest not in ("help", "layout", "src", "out")]

    def run(arguments: Namespace) -> None:
        from fastdit.data.import_latents import import_latents

        given = {key: getattr(arguments, key) for key in options}
        import_latents(arguments.layout, arguments.src, arguments.out, **given)

    return run
