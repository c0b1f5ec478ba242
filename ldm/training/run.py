"""train("vae" | "ldm" | "distill" | "classifier", config): what `ldm train` and train/*.py run."""

from __future__ import annotations

from ldm.training.config import Config

TASKS = ("vae", "ldm", "distill", "classifier")


def train(task: str, config: Config) -> list[float]:
    """Train "vae", "ldm", "distill" or "classifier" from its newest checkpoint, or from the start, to its last step.

    Returns:
        The loss of each step that this call trained, averaged over all processes.
    Raises:
        ValueError: for another name, or a config, data or a machine that can't train; names the key.
        Stopped: by a signal, with its step saved.
        RunError: if too many steps in a row were not finite, or what must be saved can't be.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")

    # here, so that a command line is parsed and its --help printed before torch is loaded
    from ldm.data.dataset import read_captioned, require_training
    from ldm.models.ema import learning
    from ldm.training.budget import decide, limited, read_budget, split_sizes
    from ldm.training.checkpoint import has_begun
    from ldm.training.distributed import build_accelerator, keep_group
    from ldm.training.doctor.examine import before_first_step
    from ldm.training.initial_model import resolved
    from ldm.training.optimizers import check_optimizer
    from ldm.training.sizes import check_sizes
    from ldm.training.task import Task
    from ldm.training.tasks import task_of_unet
    from ldm.training.tasks.autoencoder import Autoencoder
    from ldm.training.tasks.classifier import Classifier
    from ldm.training.trainer import Trainer

    if task == "ldm" and config.distill.steps:
        raise ValueError("distill.steps: a student is trained by `ldm train distill`; run that, or set it to 0")
    if task == "vae" and config.vae is not None:
        raise ValueError(
            f"vae: {config.vae} is a pretrained VAE, so there is none to train; set it to null to train one"
        )
    if task == "classifier" and config.data.label_column is None:
        raise ValueError("data.label_column: the classifier needs to know which column holds the classes; set it")
    config = resolved(config, task)
    check_sizes(config, task)
    other = {"ldm": "distill", "distill": "ldm"}.get(task)
    if other and has_begun(config.run, other):
        raise ValueError(
            f"run: {config.run} holds the checkpoints of `ldm train {other}`, and both would write its pipeline; name "
            "another run"
        )
    accelerator, data = build_accelerator(config.loop), config.data
    if task not in ("vae", "classifier"):  # which have AdamW
        check_optimizer(config.optim.name, accelerator)
    main, facts = accelerator.is_main_process, config.facts_folder()
    pictures = read_captioned(data.source, **data.reading(), facts=facts, progress=main)
    require_training(pictures)
    sizes = split_sizes(pictures, data.limit)
    accelerator.print(f"{data.source}: {sizes}{'' if len(pictures.heldout) else ', so there is no validation loss'}")
    if not has_begun(config.run, task):
        for warning in pictures.unfit(data.size, data.most_ratio if task in ("ldm", "distill") else 1.0):
            accelerator.print(f"warning: {warning}")

    def create(config: Config) -> Task:
        chosen = limited(pictures, config.data.limit, config.loop.prompts)
        return kind.create(config, accelerator, chosen)  # pictures => data and frozen networks

    others: dict[str, type[Task]] = {"vae": Autoencoder, "classifier": Classifier}
    kind = others.get(task) or task_of_unet(config)
    timed = task in ("ldm", "distill") and config.loop.minutes > 0
    budget = read_budget(config, task) if timed else None
    job = create(budget.apply(config) if budget else config)
    before_first_step(job, pictures)
    if timed and budget is None:
        budget = decide(job, len(pictures.train))
        job = create(budget.apply(config))
    if budget:
        accelerator.print(budget)
    job.prepare()  # => samples, validation set
    job.build()  # => the network that learns
    module = next(iter(job.train_state.values())).module
    accelerator.print(
        f"{job.title}: {sum(weight.numel() for weight in learning(module)) / 1e6:.1f} M parameters{job.details}, "
        f"{accelerator.mixed_precision} mixed precision on {accelerator.device.type}"
    )
    losses = Trainer(job).fit()
    accelerator.print(job.summary())
    keep_group()
    accelerator.end_training()
    return losses
