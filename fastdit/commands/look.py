"""Looking at images: the pictures of `fastdit sample`, grid and neighbors.

Each command's function adds its arguments to a parser and returns what runs it.
"""

import argparse
from argparse import ArgumentParser, Namespace
from itertools import chain, count
from pathlib import Path

from fastdit.commands.arguments import DEVICE, Command, one_name, processes, take_words, values
from fastdit.config import check_alone
from fastdit.errors import output_file
from fastdit.files import append_json
from fastdit.gallery import KEYS, OPTIONS

AXES, SETTINGS = tuple(OPTIONS.values()), {OPTIONS[axis]: key for axis, key in KEYS.items()}  # of fastdit sample


def take_pictures(parser: ArgumentParser) -> None:
    """The options of `fastdit sample` that make a picture instead of a folder."""
    group = parser.add_argument_group(
        "pictures", "With these options, RUN/sheet.png or --out shows every combination of the values.\n"
        "Each image is image 0 of fastdit sample for its class, seed and settings.")  # fmt: skip
    group.add_argument("--classes", metavar="A,B,...", help="by name or number (up to eight)")
    group.add_argument("--seeds", metavar="0-7", help="ranges and numbers, such as 0-3,10")
    group.add_argument("--cfg-scale", metavar="1,1.5,4", help="a single value only sets it, here and in the next two")
    group.add_argument("--steps", metavar="10,20,50")
    group.add_argument("--samplers", metavar="heun,dpmpp_2m")
    group.add_argument("--checkpoints", metavar="step-1000,...", help="steps of RUN, or paths of runs and checkpoints")
    axes = "class, seed, guidance, steps, sampler or checkpoint"
    group.add_argument("--rows", metavar="AXIS", help=f"{axes} (the first that varies)")
    group.add_argument("--columns", metavar="AXIS", help="the same (the next one; the rest become pages)")
    group.add_argument("--trajectory", choices=("gif", "png"), help="x_t and the predicted x_0, from noise to data")
    group.add_argument("--interpolate", choices=("seeds", "classes"), help="a row from each to the next")
    group.add_argument("--points", type=int, metavar="N", help="columns of an interpolation (11)")


def wants_picture(arguments: Namespace) -> bool:
    """Whether the options ask for a picture; where they do not, single settings become overrides."""
    texts = values(arguments, AXES)
    names = ("rows", "columns", "trajectory", "interpolate", "points")
    chosen = [key for key in AXES if texts[key] and (key not in SETTINGS or "," in texts[key])]
    if chosen or any(getattr(arguments, name) is not None for name in names):
        return True
    for key, setting in SETTINGS.items():
        if texts[key]:
            check_alone(f"--{key}={texts[key]}", setting, arguments.overrides)
            arguments.overrides.append(f"{setting}={texts[key]}")
    return False


def make_picture(path: str, arguments: Namespace) -> None:
    """Write the picture that the options of `take_pictures` ask for."""
    for name in ("num_samples", "labels"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for a folder of samples; a picture has one image for each "
                             "of --classes and --seeds")  # fmt: skip
    if arguments.trajectory and arguments.interpolate:
        raise ValueError("--trajectory and --interpolate are different pictures; make one after the other")
    for name in ("rows", "columns"):
        if getattr(arguments, name) and (arguments.trajectory or arguments.interpolate):
            raise ValueError(f"--{name} is for sheets, not for --trajectory and --interpolate")
    if arguments.points is not None and not arguments.interpolate:
        raise ValueError("--points is the number of columns of --interpolate, which is not given")
    kind = arguments.trajectory or "png"
    name = "trajectory" if arguments.trajectory else "interpolation" if arguments.interpolate else "sheet"
    out = picture_file(arguments.out, default_out(path, f"{name}.{kind}"))

    from fastdit.gallery.axes import read_axes
    from fastdit.gallery.pages import interpolation, sheet, trajectory
    from fastdit.sheets import save

    points = () if arguments.points is None else (arguments.points,)
    with processes(arguments) as ranks:
        axes = read_axes(path, device=ranks.device, **values(arguments, (*AXES, "overrides", "seed", "weights")))
        if arguments.trajectory:
            images = trajectory(axes, kind) if ranks.is_main else []
        elif arguments.interpolate:
            images = [interpolation(axes, ranks, arguments.interpolate, *points)]
        else:
            images = [sheet(axes, ranks, arguments.rows, arguments.columns)]
    if ranks.is_main:
        save(images, out)
        print(out)


def default_out(path: str | Path, name: str) -> Path:
    """RUN/name; of a checkpoint, whose own folder may be deleted, RUN/step-0000020-name."""
    from fastdit.training.checkpoint import run_of

    run = run_of(path := Path(path))
    return path / name if run == path else run / f"{path.name}-{name}"


def picture_file(given: str | None, usual: Path) -> Path:
    """--out, which must be new, or the usual file: sheet.png, or sheet-2.png and so on where that exists."""
    if not given:
        others = (usual.with_stem(f"{usual.stem}-{number}") for number in count(2))
        given = next(path for path in chain([usual], others) if not path.exists())
    return output_file(given, "--out", usual.suffix, new=True)


def grid(parser: ArgumentParser) -> Command:
    """Show a folder of images as one picture, with a labelled row for each class.

    fastdit grid images --columns 8 --out grid.png
    FOLDER: a folder with a subfolder per class, a folder of images, an archive, what fastdit sample wrote, or an .npz
    file with arr_0, uint8 (N, H, W, 3).
    """
    parser.add_argument("--rows", type=int, default=10, help="at most (10)")
    parser.add_argument("--columns", type=int, default=10, help="at most (10)")
    parser.add_argument("--labels", action=argparse.BooleanOptionalAction, default=None,
                        help="a row for each class, with its name (default: if there are several)")  # fmt: skip
    parser.add_argument("--size", type=int, default=256, help="scale larger images down to this width and height (256)")
    parser.add_argument("--out", help="a new .png file (grid.png, or grid-2.png, ...)")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    take_words(parser, "FOLDER", overrides=False)

    def run(arguments: Namespace) -> None:
        from fastdit.gallery.folders import folder_grid
        from fastdit.sheets import save

        chosen = one_name(arguments, "folder", "folder of images")
        out = picture_file(arguments.out, Path("grid.png"))
        image = folder_grid(chosen, arguments.rows, arguments.columns, labels=arguments.labels, side=arguments.size)
        save([image], out)
        print(out)

    return run


def neighbors(parser: ArgumentParser) -> Command:
    """Show the training images nearest to samples, and measure memorization.

    fastdit neighbors samples --reference images --held-out new_images
    fastdit neighbors samples --reference latents
    SAMPLES: a folder that fastdit sample wrote, a folder of images, or an .npz file with arr_0, uint8 (N, H, W, 3).
    --reference: the training images, or their latents; distances are then between latents, also of mirror images.
    A sample counts as memorized if it is nearer to the training images than 99% of the held-out images are. Without
    --held-out, training images and their nearest others take the place of the held-out images.
    """
    parser.add_argument("--reference", help="the training images, or their latents")
    parser.add_argument("--held-out", help="images, or latents, that were not trained on")
    parser.add_argument("--features", metavar="NAME[=PATH]", help="latents (default with latents), or as for evaluate")
    parser.add_argument("-k", type=int, default=5, help="training images to show for each sample (5)")
    parser.add_argument("--rows", type=int, default=8, help="samples to show, those nearest to a training image (8)")
    parser.add_argument("--image-size", help="center-crop folders of images, as fastdit extract does")
    parser.add_argument("--vae", help="the autoencoder of the latents, if it was moved")
    parser.add_argument("--seed", type=int, default=0, help="of resamples, and of the choice of training images")
    parser.add_argument("--out", help="the sheet, a new .png file (neighbors.png, or neighbors-2.png, ...)")
    parser.add_argument("--results", metavar="FILE", help="append the result and its protocol to this .jsonl file")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--samples", help=argparse.SUPPRESS)
    take_words(parser, "SAMPLES", overrides=False)

    def run(arguments: Namespace) -> None:
        samples = one_name(arguments, "samples", "folder or .npz file of samples")
        if not arguments.reference:
            arguments.parser.error("give the training images with --reference")
        out, results = picture_file(arguments.out, Path("neighbors.png")), arguments.results
        if results:
            output_file(results, "--results", ".jsonl")
        from fastdit.evaluation.memorization import neighbors, summary
        from fastdit.sheets import save

        options = ("held_out", "features", "k", "rows", "seed", "image_size", "vae")
        with processes(arguments) as ranks:
            result, sheet = neighbors(samples, arguments.reference, ranks, **values(arguments, options))
        if ranks.is_main:
            save([sheet], out)
            print(summary(result))
            print(out)
            if results:
                append_json(results, result)

    return run
