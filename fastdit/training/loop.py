"""The training run, from config to checkpoints, as one flat function."""

import time
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import torch

from fastdit import distributed
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
from fastdit.data.loader import check_cache, latent_batches, on_device, sample_keys
from fastdit.diffusion.timesteps import LossAwareTimes
from fastdit.distributed import seed_of
from fastdit.environment import write_environment
from fastdit.errors import out_of_memory_says
from fastdit.lock import FolderLock
from fastdit.memory import choose, micro_batches, smaller_batch
from fastdit.schema import Config
from fastdit.training import checkpoint
from fastdit.training.alignment import attach, features_for
from fastdit.training.ema import EMA, PowerAverage, too_young
from fastdit.training.engine import build_engine
from fastdit.training.graph import GraphedStep
from fastdit.training.guard import EXIT_STOPPED, Guard, Requests
from fastdit.training.initial import take_over
from fastdit.training.log import Log, LossWindow, say, start_line, training_flops
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
from fastdit.training.watchdog import COMPUTES, LOGS, READS, Watchdog
from fastdit.unused import unused

INIT, ORDER, NOISE = range(3)  # what a seed is for, so that no two uses share a stream


def train(config: Config, *, resume: bool = False, device: str | None = None, read_initial=None, report=None) -> Path:
    """Train as `config` says and return the last checkpoint; `resume` continues from the newest one in `run_dir`.

    `read_initial(path, config)` reads the weights and EMA of training.init_from (convert.read_initial: every format).
    `report(run_dir, device)` writes the report of a run that has ended, on the main process, and returns a line to log
    (report.report_at_end).
    """
    timeout_s = 2 * config.training.timeout_s  # the watchdog speaks first
    ranks, run_dir = distributed.init(device, timeout_s), Path(config.run_dir)
    checkpoint.check_run_dir(run_dir, resume)
    if config.training.init_from and read_initial is None:
        raise ValueError("training.init_from needs train(..., read_initial=fastdit.convert.read_initial)")
    with FolderLock(run_dir, "run_dir") if ranks.is_main else nullcontext():
        last = _train(config, run_dir, ranks, resume, read_initial)
        if report and config.training.report and ranks.is_main:  # now, when the training's memory is free
            say(run_dir, report(run_dir, ranks.device))
    return last


def _prepare(run_dir: Path, config: Config, ranks: distributed.Ranks, start: int) -> None:
    """Write what the folder of a run says about it, and remove what a repeated part writes again."""
    save_config(config, run_dir / CONFIG)
    write_environment(run_dir, ranks, start)
    forget_averages(run_dir, start)
    keep_autoencoder(config.data.vae, run_dir)


def _train(config: Config, run_dir: Path, ranks: distributed.Ranks, resume: bool, read_initial) -> Path:
    device = ranks.device
    requests = Requests(run_dir, config.training.time_limit_s, 60 * config.training.checkpoint_minutes)  # it counts now
    last = checkpoint.newest_good(run_dir, ranks, print) if resume else None
    # data: what the shards hold must be what the config means
    manifest, held_out = shards_of(config)
    config, latents = resolved(config, manifest), manifest.latents
    settings, features, classes = config.training, features_for(config), manifest.classes_of(config.data.num_classes)
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
        _prepare(run_dir, config, ranks, start)
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
        log.skip(done, sample_keys(manifest, order, settings.global_batch, done - 1), plain_step.times_of(done - 1))

    guard = Guard(settings.max_skipped, ranks, on_skip)
    facts = describe(config, latents, classes, features) | {"contents": manifest.contents}
    with (
        Watchdog(run_dir, ranks, settings.timeout_s) as watchdog,
        checkpoint.Writer(run_dir, ranks, settings.keep_checkpoints, settings.keep_every) as writer,
        closing(on_device(batches, device)) as batches,
        requests,
        out_of_memory_says(f"{device} has too little memory for {smaller_batch(policy, micro)}"),
    ):
        monitor.begin(engine, ema, log, watchdog, requests, start)
        clock, clock_step = time.perf_counter(), start
        for step in range(start, settings.steps):
            watchdog.at(step + 1, READS)
            _, *given = next(batches)
            watchdog.at(step + 1, COMPUTES)
            lr = learning_rate(step)
            losses, grad_norm, skipped = train_step(step, lr, *given)
            window.add(losses, skipped)

            done = step + 1
            guard.add(done, skipped, *requests.poll(), writer.failed)
            log_due = done % settings.log_every == 0 or done == settings.steps
            save_due = done % settings.checkpoint_every == 0 or done == settings.steps
            log.step()
            watchdog.at(done, LOGS)
            if log_due or save_due:
                guard.flush()
                means = window.means()  # the only wait for the device
            if log_due:
                seconds, steps = time.perf_counter() - clock, done - clock_step
                clock, clock_step = time.perf_counter(), done
                window.clear()
                log.write(done, means, grad_norm=grad_norm.item(), lr=lr, seconds=seconds, steps=steps,
                          images=steps * settings.global_batch, monitor_s=monitor.remaining(done))  # fmt: skip
            if save_due or guard.save or guard.stop or guard.failed:
                writer.wait()  # raises the error of a failed write; the copy below replaces what it reads
                last = writer.start(done, partial(write_snapshot, state.snapshot(), config), facts)
                guard.save, requests.saved = False, time.monotonic()
            if guard.stop and done < settings.steps:
                writer.wait()
                log.say(f"stopped at step {done} by {requests.reason or 'another process'}: continue with --resume")
                raise SystemExit(EXIT_STOPPED)
            clock += monitor(done)
        writer.wait()
    log.say(too_young(settings, settings.steps))
    log.say(f"checkpoint {last}; next: fastdit sample {run_dir} --num-samples 64")
    log.close()
    return last
