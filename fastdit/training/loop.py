"""The training run, from config to checkpoints, as one flat function."""

from contextlib import closing
from functools import partial
from pathlib import Path
from shlex import quote

import torch

from fastdit.build import (
    build_network,
    build_objective,
    build_routing,
    check_device,
    check_sampling,
    prepare_for_training,
    resolved,
    shards_of,
    uses_zero,
)
from fastdit.config import save_config
from fastdit.data.loader import check_cache, latent_batches, on_device, replaced_keys, sample_keys
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import Ranks, seed_of
from fastdit.environment import write_environment
from fastdit.errors import out_of_memory_says
from fastdit.memory import choose, micro_batches, smaller_batch
from fastdit.schema import Config
from fastdit.training import checkpoint
from fastdit.training.alignment import attach, features_for
from fastdit.training.ema import EMA, PowerAverage, too_young
from fastdit.training.engine import build_engine
from fastdit.training.graph import GraphedStep
from fastdit.training.guard import Requests
from fastdit.training.initial import take_over
from fastdit.training.log import Log, LossWindow, start_line, training_flops
from fastdit.training.monitor import Monitor
from fastdit.training.schedule import learning_rates
from fastdit.training.state import (
    CONFIG,
    TrainingState,
    changed_since,
    describe,
    forget_averages,
    keep_autoencoder,
    resumed_weights,
    write_snapshot,
)
from fastdit.training.step import TrainStep
from fastdit.training.upkeep import Upkeep, agree, run_folder
from fastdit.training.watchdog import COMPUTES, READS
from fastdit.unused import unused

INIT, ORDER, NOISE = range(3)  # what a seed is for, so that no two uses share a stream


def train(
    config: Config, *, resume: bool = False, device: str | None = None, read_initial=None, report=None,
    started: float | None = None,
) -> Path:  # fmt: skip
    """Train as `config` says and return the last checkpoint; `resume` continues from the newest one in `run_dir`.

    `read_initial(path, config)` reads the weights and EMA of training.init_from (convert.read_initial: every format).
    `report(run_dir, device)` writes the report of a run that has ended, on the main process, and returns a line to log
    (report.report_at_end). `started`: see Requests.
    """
    if config.training.init_from and read_initial is None:
        raise ValueError("training.init_from needs train(..., read_initial=fastdit.convert.read_initial)")
    with run_folder(config, resume, device, report) as (run_dir, ranks):
        settings = config.training
        requests = Requests(run_dir, settings.time_limit_s, 60 * settings.checkpoint_minutes, started)
        return _train(config, run_dir, ranks, resume, read_initial, requests)


def _train(config: Config, run_dir: Path, ranks: Ranks, resume: bool, read_initial, requests: Requests) -> Path:
    device = ranks.device
    last = checkpoint.newest_good(run_dir, ranks, print) if resume else None
    # data: what the shards hold must be what the config means
    manifest, held_out = shards_of(config)
    config, latents = resolved(config, manifest), manifest.latents
    settings, features, classes = config.training, features_for(config), manifest.classes_of(config.data.num_classes)
    images = {"images": manifest.contents, "held out": held_out and held_out.contents}
    shares = {"weights": getattr(manifest, "weights", ()), "features": features and features.facts()}
    agree(ranks, config, last, images | shares)
    check_cache(manifest, features)
    check_device(settings, device)
    micro_batches(settings.global_batch, max(settings.micro_batch, 0), ranks.world)  # that they divide

    # objective and network, from the seed alone: every process starts with the same weights
    objective = build_objective(config)
    learning_rate, times = learning_rates(settings), LossAwareTimes() if settings.loss_aware_times else None
    torch.manual_seed(seed_of(config.seed, INIT))
    model = build_network(config, latents.shape, objective, device).to(device).train()
    routing = build_routing(settings, model)
    alignments = attach(settings.align, model, features.dim if features else 0, routing)
    check_sampling(config, objective, model.null_label)  # a misspelled sampler fails now, not after the training
    monitor = Monitor(config, manifest, held_out, objective, ranks)
    flops_per_image = training_flops(model, routing)
    initial, origin = None, "from random weights"
    if last:
        model.load_state_dict(resumed_weights(last, config, manifest, model, features))
    elif settings.init_from:
        source = read_initial(settings.init_from, config)
        initial, kept = take_over(model.state_dict(), source, settings.init_from, model.null_label, classes)
        model.load_state_dict(initial[0])
        origin = f"from {settings.init_from}" + (f", except for {', '.join(kept)}" if kept else "")
    policy, micro, accumulation, step_s = choose(config, model, ranks)
    objective = prepare_for_training(model, objective, settings, policy)
    engine = build_engine(model, settings, ranks, micro, accumulation)
    ema = EMA(engine.master_parameters(), settings.ema_decay, settings.ema_warmup)
    averages = [PowerAverage(engine.master_parameters(), std) for std in settings.ema_stds]
    window = LossWindow(device)
    state = TrainingState(config, ranks, engine, ema, averages, window, times)
    start = state.load(last) if last else 0
    if initial is not None:
        ema.load(engine.partition(initial[1]))

    train_step = TrainStep(
        engine, ema, objective, ranks, latents, config.model.class_dropout, model.null_label, micro, accumulation,
        seed=seed_of(config.seed, NOISE), times=times, averages=averages, alignments=alignments, routing=routing,
    )  # fmt: skip
    plain_step = train_step
    if settings.cuda_graph:
        train_step = GraphedStep(train_step)

    if ranks.is_main:
        save_config(config, run_dir / CONFIG)
        write_environment(run_dir, ranks, start)
        forget_averages(run_dir, start)
        keep_autoencoder(config.data.vae, run_dir)
    log = Log(run_dir, ranks, start, config, images=len(manifest), flops_per_image=flops_per_image)
    remarks = [f"warning: {line}" for line in (*manifest.scale_remarks(), *unused(config, uses_zero(settings)))]
    remarks.append(too_young(settings, settings.steps))
    batch = ranks.world, micro, accumulation
    origin, predicted_s = f"resumed at step {start}" if start else origin, step_s * (settings.steps - start)
    for line in (start_line(config, model, manifest, ranks, engine.name, policy, batch, origin, predicted_s), *remarks):
        log.say(line)
    if last and (changed := changed_since(last, config, manifest)):
        log.say(f"changed since step {start}: {changed}")
    order, own = seed_of(config.seed, ORDER), micro * accumulation
    batches = latent_batches(
        manifest,
        global_batch=settings.global_batch,
        rows=slice(ranks.rank * own, (ranks.rank + 1) * own),
        seed=order,
        start_step=start,
        hflip=config.data.hflip,
        prefetch=config.data.prefetch,
        pin_memory=device.type == "cuda",
        skip_damaged=log.say_own if config.data.skip_damaged else None,
        features=features,
    )

    def on_skip(done: int) -> None:
        batch, step = settings.global_batch, done - 1
        again = config.data.skip_damaged and ranks.is_main
        replaced = replaced_keys(manifest, features, global_batch=batch, seed=order, step=step,
                                 hflip=config.data.hflip) if again else {}  # fmt: skip
        log.skip(done, sample_keys(manifest, order, batch, step), plain_step.times_of(step), replaced)

    facts = describe(config, latents, classes, features) | {"contents": manifest.contents}
    with (
        Upkeep(
            run_dir, ranks, settings, log, window, requests, facts=facts, on_skip=on_skip, remaining=monitor.remaining,
            snapshot=lambda: partial(write_snapshot, state.snapshot(), config),
        ) as upkeep,
        closing(on_device(batches, device)) as batches,
        out_of_memory_says(f"{device} has too little memory for {smaller_batch(policy, micro)}"),
    ):  # fmt: skip
        monitor.begin(engine, ema, log, upkeep.watchdog, upkeep.requests, start)
        upkeep.begin(start)
        for step in range(start, settings.steps):
            upkeep.watchdog.at(step + 1, READS)
            _, *given = next(batches)
            upkeep.watchdog.at(step + 1, COMPUTES)
            lr = learning_rate(step)
            upkeep.after(step + 1, train_step(step, lr, *given), lr)
            upkeep.clock += monitor(step + 1)
        last = upkeep.end() or last
    log.say(too_young(settings, settings.steps))
    log.say(f"checkpoint {last}; next: fastdit sample {quote(str(run_dir))} --num-samples 64")
    log.close()
    return last
