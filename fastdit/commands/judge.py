"""Judging a run: evaluate, report, likelihood and verify.

Each function adds its arguments to a parser and returns what runs it.
"""

import argparse
from argparse import ArgumentParser, Namespace
from pathlib import Path

from fastdit.commands.arguments import DEVICE, RUN, Command, one_name, processes, take_words, values
from fastdit.errors import EXIT_CODE, output_file
from fastdit.files import append_json


def evaluate(parser: ArgumentParser) -> Command:
    """Measure samples against real images, or compare two measurements.

    fastdit evaluate samples --reference images --out results.jsonl
    fastdit evaluate runs/mine --reference images --num-samples 10000 sampling.cfg_scale=1.5
    fastdit evaluate runs/mine --reference images --num-samples 1000 --sweep cfg_scale=1,1.5,2 weights=ema,model
    fastdit evaluate runs/mine --loss --out losses.jsonl
    fastdit evaluate --compare a.jsonl b.jsonl
    SAMPLES: a folder that fastdit sample wrote, a folder of images, an .npz file with arr_0, uint8 (N, H, W, 3), or a
    run, whose samples are the images that fastdit sample would write.
    --reference also takes archives as fastdit extract does, latents, files of --save-reference, and ADM's statistics.
    --loss gives the validation loss of a run, in total and for 20 parts of t, on the images that the run held out.
    The digits do not depend on the number of processes. --compare reads the last line of each file.
    """
    parser.add_argument("--reference", help="real images, or their statistics")
    parser.add_argument("--features", default="efficientnet-lite0", metavar="NAME[=PATH]",
                        help="efficientnet-lite0 (default), inception-v3=FILE, dinov2-vit-l14=FOLDER, "
                                        "classifier=FILE")  # fmt: skip
    parser.add_argument("--metrics", help="frechet, frechet_infinity, spatial_frechet, kid, precision_recall, "
                                          "density_coverage, inception_score, with commas between (all)")  # fmt: skip
    parser.add_argument("--image-size", help="center-crop folders of images, as fastdit extract does")
    parser.add_argument("--loss", action="store_true", help="the validation loss of a run instead of its samples")
    parser.add_argument("--shards", metavar="DIR", help="latents for --loss (the run's own, which it held out)")
    parser.add_argument("--num-samples", type=int, help="of a run; with --loss the number of images (1280)")
    parser.add_argument("--labels", help="of a run: balanced (default), random, or classes by name or number: 207,360")
    parser.add_argument("--weights", choices=("ema", "model"), help="of a run (ema)")
    parser.add_argument("--seed", type=int, default=0, help="of a run's samples and of the random subsets (0)")
    parser.add_argument("--save-reference", metavar="FILE",
                        help="a new .npz file that --reference reads without extracting features again")  # fmt: skip
    parser.add_argument("--out", help="append the result and its protocol to this .jsonl file, as one line")
    parser.add_argument("--sweep", nargs="+", metavar="KEY=VALUE,VALUE",
                        help="of a run: all combinations of values of weights and of sampling.KEY, as a table; with "
                             "--out, a plot next to it, and lines that it has are not measured again")  # fmt: skip
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two files of --out")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--samples", help=argparse.SUPPRESS)
    take_words(parser, "SAMPLES")

    def run(arguments: Namespace) -> None:
        from fastdit.evaluation.protocol import compare

        given = [a.dest for a in parser._actions if getattr(arguments, a.dest, a.default) != a.default]
        given = [f"--{key.replace('_', '-')}" for key in given]
        if arguments.compare:
            options = [option for option in given if option not in ("--compare", "--device")]
            if extra := [*arguments.names, *arguments.overrides, *options]:
                arguments.parser.error(f"{extra[0]} means nothing with --compare; leave it out")
            return print(compare(*arguments.compare))
        samples = one_name(arguments, "samples", "run, folder or .npz file of samples")
        if arguments.loss and arguments.reference:
            arguments.parser.error("--loss takes latents with --shards, no --reference")
        if arguments.loss:
            unused = ("features", "metrics", "image-size", "labels", "seed", "save-reference", "sweep")
            if unused := [option for option in given if option.removeprefix("--") in unused]:
                arguments.parser.error(f"{', '.join(unused)} means nothing with --loss; leave it out")
        if arguments.shards and not arguments.loss:
            arguments.parser.error("--shards is for --loss")
        if not (arguments.reference or arguments.loss):
            arguments.parser.error("give real images with --reference")
        if arguments.out:
            output_file(arguments.out, "--out", ".jsonl")
        _loss(arguments, samples) if arguments.loss else _measure(arguments, samples)

    return run


def _loss(arguments: Namespace, run: str) -> None:
    from fastdit.evaluation.images import is_run
    from fastdit.evaluation.loss import loss_table
    from fastdit.training.validation import loss_of_run

    if not is_run(run):
        raise ValueError(f"--loss: {run} is not a run; name one")
    with processes(arguments) as ranks:
        result = loss_of_run(run, ranks, **values(arguments, ("shards", "num_samples", "weights", "overrides")))
    if ranks.is_main:
        print(loss_table(result))
        if arguments.out:
            append_json(arguments.out, result)


def _measure(arguments: Namespace, samples: str) -> None:
    from fastdit.evaluation.evaluate import evaluate
    from fastdit.evaluation.images import check_crop, is_run
    from fastdit.evaluation.protocol import summary
    from fastdit.sweep import plot, points, samples_of, sweep, table

    of_run = values(arguments, ("num_samples", "labels", "weights", "overrides"))
    given = [f"--{key.replace('_', '-')}" for key in of_run if of_run[key] and key != "overrides"]
    given += ["--sweep"] * bool(arguments.sweep) + arguments.overrides
    if given and not is_run(samples):
        raise ValueError(f"{', '.join(given)}: SAMPLES={samples} is not a run")
    check_crop(arguments.image_size, samples, arguments.reference)
    chosen = points(arguments.sweep or ())
    options = values(arguments, ("features", "image_size", "seed", "save_reference"))
    options["metrics"] = arguments.metrics.split(",") if arguments.metrics else None
    with processes(arguments) as ranks:
        images = samples_of(samples, ranks.device, chosen, seed=arguments.seed, **of_run) if is_run(samples) else []
        if arguments.sweep:
            results = sweep(chosen, images, arguments.reference, ranks, out=arguments.out, **options)
        else:
            result = evaluate(images[0] if images else samples, arguments.reference, ranks, **options)
    if ranks.is_main and arguments.sweep:
        print(table(chosen, results))
        if arguments.out:
            plot(chosen, results, picture := Path(arguments.out).with_suffix(".png"))
            print(f"plot: {picture}")
    elif ranks.is_main:
        print(summary(result))
        if arguments.out:
            append_json(arguments.out, result)


def report(parser: ArgumentParser) -> Command:
    """Show a run on one HTML page, or several side by side.

    fastdit report runs/mine
    fastdit report runs/a runs/b --out comparison.html sampling.cfg_scale=4
    Runs of fastdit train, or of fastdit train-vae. Training writes the page of its run at its end.
    """
    parser.add_argument("--out", help="the page (RUN/report.html; for several runs: report.html)")
    parser.add_argument("--device", help=DEVICE)
    take_words(parser, "RUN ...")
    parser.set_defaults(max_names=4)

    def run(arguments: Namespace) -> None:
        if not arguments.names:
            arguments.parser.error("name one run, or up to four")
        from fastdit.distributed import init
        from fastdit.report import write_report

        device = init(arguments.device).device
        print(write_report(arguments.names, arguments.out, device=device, overrides=arguments.overrides))

    return run


def likelihood(parser: ArgumentParser) -> Command:
    """Compute the likelihood of latents under a checkpoint."""
    parser.add_argument("--checkpoint", required=True, help=RUN)
    parser.add_argument("--shards", required=True, help="a folder of latents")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--probes", type=int, help="random directions for the divergence (4)")
    parser.add_argument("--steps", type=int, help="number of ODE steps (50)")
    parser.add_argument("--method", choices=("heun", "euler", "vlb"), default="heun", help="vlb: bound, DDPM only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help=DEVICE)
    options = [a.dest for a in parser._actions if a.dest not in ("help", "checkpoint", "shards")]
    parser.add_argument("--out", help="a new .json file for the results")
    take_words(parser, None)

    def run(arguments: Namespace) -> None:
        from fastdit.likelihood import likelihood, write_report

        chosen = values(arguments, [*options, "overrides"])
        if arguments.out:
            output_file(arguments.out, "--out", ".json", new=True)
        report = likelihood(arguments.checkpoint, arguments.shards, **chosen)
        if arguments.out:
            write_report(report, arguments.out)

    return run


def verify(parser: ArgumentParser) -> Command:
    """Check a checkpoint or a folder of latents for damage."""
    parser.add_argument("path", help=f"{RUN}, or a folder of latents")

    def run(arguments: Namespace) -> None:
        from fastdit.verify import verify

        findings = verify(arguments.path)
        for line in findings:
            print("wrong:", line)
        if findings:
            raise SystemExit(EXIT_CODE)
        print("all is well")

    return run
