"""Folders of latents: import and shards.

Each function adds its arguments to a parser and returns what runs it.
"""

from argparse import ArgumentParser, Namespace

from fastdit.commands.arguments import Command, values
from fastdit.errors import counted


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

        import_latents(arguments.layout, arguments.src, arguments.out, **values(arguments, options))

    return run


def shards(parser: ArgumentParser) -> Command:
    """Look at folders of latents, merge, split or repair them.

    fastdit shards stats latents
    fastdit shards merge a b c OUT
    fastdit shards split latents TRAIN VAL --fraction 0.01
    fastdit shards sample latents sheet.png --per-class 2
    fastdit shards repair latents OUT
    No folder is changed: results are new folders, which appear once they are complete. merge, split and sample take
    features (extract --encoder) along; repair does not. fastdit verify checks a folder.
    """
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))

    def action(name: str, help: str, run: Command) -> ArgumentParser:
        added = actions.add_parser(name, help=help, description=f"{help}.")
        added.set_defaults(act=run, parser=added)
        return added

    def stats(arguments: Namespace) -> None:
        from fastdit.data.shards import stats

        print(stats(arguments.folder, arguments.every_class, arguments.cache))

    def merge(arguments: Namespace) -> None:
        from fastdit.data.shards import merge

        *folders, out = arguments.folders
        merged = merge(folders, out, **values(arguments, ("features", "overwrite", "cache")))
        print(f"{out}: {counted(len(merged), 'image')}")

    def split(arguments: Namespace) -> None:
        from fastdit.data.shards import split

        options = ("fraction", "count", "per_class", "features", "overwrite", "cache")
        for part in split(arguments.folder, arguments.train, arguments.val, **values(arguments, options)):
            print(f"{part.folder}: {counted(len(part), 'image')}")

    def sample(arguments: Namespace) -> None:
        from fastdit.data.shards import sample

        options = ("count", "per_class", "seed", "vae", "features", "overwrite", "cache")
        print(sample(arguments.folder, arguments.out, **values(arguments, options)))

    def repair(arguments: Namespace) -> None:
        from fastdit.data.shards import repair

        repair(arguments.folder, arguments.out, overwrite=arguments.overwrite)

    shown = action("stats", "Images, classes, statistics of the channels, autoencoder and size", stats)
    shown.add_argument("folder", metavar="DIR")
    shown.add_argument("--every-class", action="store_true", help="the number of images of each class")
    merged = action("merge", "Write the images of several folders to a new one", merge)
    merged.add_argument("folders", metavar="DIR", nargs="+", help="the folders, and then the new one")
    parts = action("split", "Write two folders, for training and validation", split)
    parts.add_argument("folder", metavar="DIR")
    parts.add_argument("train", metavar="TRAIN", help="the new folder with all other images")
    parts.add_argument("val", metavar="VAL", help="the new folder with the chosen images, the same in every run")
    parts.add_argument("--fraction", type=float, help="of the images, as data.val_fraction chooses them")
    some = action("sample", "Random images: OUT.png is a sheet of them, decoded; any other OUT a new folder", sample)
    some.add_argument("folder", metavar="DIR")
    some.add_argument("out", metavar="OUT")
    some.add_argument("--seed", type=int, default=0)
    some.add_argument("--vae", help="the autoencoder, if it was moved")
    for added in (parts, some):
        added.add_argument("--count", type=int, help="of images" + (" (64)" if added is some else ""))
        added.add_argument("--per-class", type=int, help="images of each class")
    saved = action("repair", "Write the intact samples of a damaged folder to a new one, and name the others", repair)
    saved.add_argument("folder", metavar="DIR")
    saved.add_argument("out", metavar="OUT")
    for added in (merged, parts, some):
        added.add_argument("--no-features", dest="features", action="store_false", help="leave out the features")
    for added in (shown, merged, parts, some):
        added.add_argument("--cache", default="", metavar="FOLDER", help="for the files of a DIR that is a URL")
    for added in (merged, parts, some, saved):
        added.add_argument("--overwrite", action="store_true", help="replace the result if it is there")
    return lambda arguments: arguments.act(arguments)
