"""The schedulers of a DiTPipeline folder: an objective is written as one, and read from one.

The schedule of a DDPM scheduler is recognized by its table, however its config states it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdit.convert.settings import checked
from fastdit.diffusion.objectives import DDPM, FlowMatching, Objective
from fastdit.diffusion.paths import SCHEDULES

SAMPLERS = {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm", "FlowMapEulerDiscreteScheduler": "euler"}
CLOSE = 1e-6  # of sqrt(alphas_cumprod); diffusers computes it in fp32, which is exact to 3e-7
_LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled_linear": _LATENT,
    "zero_terminal_snr": {**_LATENT, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}
_PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_TABLE = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
_FLOW = {"num_train_timesteps": (1,), "shift": None}
_DIFFUSION = {
    **dict.fromkeys(_TABLE),
    "num_train_timesteps": (1000,),
    "prediction_type": tuple(_PREDICTIONS.values()),
    "variance_type": ("fixed_small", "fixed_large", "learned_range"),
    "clip_sample": None,
    "clip_sample_range": (1.0,),  # that of sampling.clip=static
    "thresholding": (False,),
    # which steps a sampler takes is the user's choice, as sampling.steps; the others need thresholding
    **dict.fromkeys(("timestep_spacing", "steps_offset", "set_alpha_to_one")),
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value")),
}


def scheduler_of(objective: Objective):
    """The diffusers scheduler for DiTPipeline; ValueError if diffusers has none for the objective."""
    if isinstance(objective, DDPM):
        from diffusers import DDIMScheduler

        if objective.schedule not in _BETAS:
            raise ValueError(
                f"objective.schedule={objective.schedule!r} has no scheduler in diffusers; keep the fastdit checkpoint"
            )
        prediction = _PREDICTIONS[objective.prediction]
        return DDIMScheduler(**_BETAS[objective.schedule], prediction_type=prediction, clip_sample=False)
    if not isinstance(objective, FlowMatching):
        kind = type(objective).__name__
        raise ValueError(f"objective {kind} has no scheduler in diffusers; keep the fastdit checkpoint")
    for key, only in (("interpolant", "linear"), ("prediction", "velocity")):
        if getattr(objective, key) != only:
            value = getattr(objective, key)
            raise ValueError(f"objective.{key}={value!r} has no scheduler for DiTPipeline; only {only} can be exported")
    shift = objective.shift if objective.sample_shift is None else objective.sample_shift
    # its timesteps are t, from 1 to 0
    return _class("FlowMapEulerDiscreteScheduler", "a flow checkpoint")(num_train_timesteps=1, shift=shift)


def _class(name: str, where: str | Path) -> type:
    import diffusers

    if not hasattr(diffusers, name):
        raise ValueError(f"{where} needs {name} of diffusers 0.42 or newer: pip install -U diffusers")
    return getattr(diffusers, name)


def settings_of(config: Mapping[str, Any], learn_sigma: bool, where: str | Path) -> dict[str, Any]:
    """What the config of a scheduler says, as dotted config keys; ValueError for what fastdit cannot express.

    `learn_sigma`: whether the network has 2C output channels, which DiTPipeline takes for a learned variance.
    """
    name = config.get("_class_name")
    if name not in SAMPLERS:
        raise ValueError(
            f"{where}: _class_name={name!r} cannot be converted; replace the scheduler by one of "
            f"{', '.join(SAMPLERS)}, such as DDIMScheduler.from_config(pipe.scheduler.config)"
        )
    cls = _class(name, where)
    said = {"sampling.sampler": SAMPLERS[name]}
    if name == "FlowMapEulerDiscreteScheduler":
        settings = checked(config, _FLOW, cls, where)
        shift = {} if settings["shift"] == 1 else {"objective.sample_shift": settings["shift"]}
        return said | {"objective.name": "flow"} | shift
    settings = checked(config, _DIFFUSION, cls, where)
    table = cls(**{key: settings[key] for key in _TABLE}).alphas_cumprod.double().sqrt()
    schedules = [key for key, ours in SCHEDULES.items() if (table - ours().sqrt()).abs().max() < CLOSE]
    if not schedules:
        stated = ", ".join(f"{key}={str(settings[key])[:60]}" for key in _TABLE if settings[key] not in (None, False))
        raise ValueError(f"{where}: {stated} is none of the schedules that fastdit has: {', '.join(SCHEDULES)}")
    [prediction] = (ours for ours, theirs in _PREDICTIONS.items() if theirs == settings["prediction_type"])
    # DDIM is deterministic, so that its config has no variance
    variance = settings.get("variance_type", "learned_range" if learn_sigma else "fixed_small")
    if variance == "learned_range" and not learn_sigma:
        raise ValueError(f"{where}: variance_type='learned_range' needs a network with twice as many output channels")
    said |= {"objective.name": "ddpm", "objective.schedule": schedules[0], "objective.prediction": prediction}
    if variance != "learned_range":
        said |= {"objective.variance": variance, "objective.loss_type": "mse"}
    return said | ({"sampling.clip": "static"} if settings["clip_sample"] else {})
